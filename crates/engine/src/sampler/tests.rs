#![expect(clippy::float_cmp, reason = "these values are exact")]

use proptest::prelude::*;

use super::*;

fn neutral() -> Sampling {
    Sampling {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 1,
        top_logprobs: None,
        logit_bias: Vec::new(),
    }
}

fn greedy() -> Sampling {
    Sampling {
        temperature: 0.0,
        ..neutral()
    }
}

fn choose_with(
    logits: &[f32],
    sampling: &Sampling,
    stop: &Stop,
    history: &History,
    index: usize,
) -> u32 {
    Sampler::default()
        .choose(logits, sampling, stop, history, index)
        .unwrap()
        .token
}

fn choose(logits: &[f32], sampling: &Sampling, index: usize) -> u32 {
    choose_with(
        logits,
        sampling,
        &Stop::default(),
        &History::default(),
        index,
    )
}

/// Which tokens come out over many draws, and how often.
fn shares(logits: &[f32], sampling: &Sampling) -> BTreeMap<u32, f64> {
    let draws = 20_000;
    let mut shares = BTreeMap::new();
    for index in 0..draws {
        *shares.entry(choose(logits, sampling, index)).or_default() += 1.0 / draws as f64;
    }
    shares
}

fn assert_shares(logits: &[f32], sampling: &Sampling, expected: &[(u32, f64)]) {
    let shares = shares(logits, sampling);
    assert_eq!(shares.len(), expected.len(), "{shares:?}");
    for (token, share) in expected {
        assert!((shares[token] - share).abs() < 0.015, "{shares:?}");
    }
}

/// Logits of these probabilities.
fn logits_of(probabilities: &[f64]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() as f32).collect()
}

#[test]
fn greedy_takes_the_first_of_equals() {
    assert_eq!(choose(&[1.0, 5.0, 5.0, 2.0], &greedy(), 0), 1);
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = logits_of(&[0.5, 0.3, 0.15, 0.05]);
    let all = [(0, 0.5), (1, 0.3), (2, 0.15), (3, 0.05)];
    assert_shares(&logits, &neutral(), &all);
}

#[test]
fn temperature_sharpens() {
    let logits = logits_of(&[0.6, 0.4]);
    let sharp = Sampling {
        temperature: 0.5,
        ..neutral()
    };
    assert_shares(&logits, &sharp, &[(0, 0.36 / 0.52), (1, 0.16 / 0.52)]);
}

#[test]
fn top_k_top_p_and_min_p_drop_the_tail() {
    let logits = logits_of(&[0.15, 0.5, 0.05, 0.3]);
    let top_k = Sampling {
        top_k: 2,
        ..neutral()
    };
    assert_shares(&logits, &top_k, &[(1, 0.625), (3, 0.375)]);
    let top_p = Sampling {
        top_p: 0.81,
        ..neutral()
    };
    let three = [(1, 0.5 / 0.95), (3, 0.3 / 0.95), (0, 0.15 / 0.95)];
    assert_shares(&logits, &top_p, &three);
    let min_p = Sampling {
        min_p: 0.29,
        ..neutral()
    };
    assert_shares(&logits, &min_p, &three);
}

#[test]
fn top_p_keeps_at_least_the_best_token() {
    let sampling = Sampling {
        top_p: 1e-6,
        ..neutral()
    };
    assert_shares(&logits_of(&[0.2, 0.5, 0.3]), &sampling, &[(1, 1.0)]);
}

#[test]
fn top_p_over_a_large_vocabulary_is_that_of_a_full_sort() {
    let logits: Vec<f32> = (0..5000u32)
        .map(|i| ((i * 7919) % 5000) as f32 * 0.001)
        .collect();
    let sampling = Sampling {
        top_p: 0.5,
        ..neutral()
    };
    let mut order: Vec<u32> = (0..5000).collect();
    order.sort_by(|&a, &b| best_first(&logits, a, b));
    let weight = |token: u32| f64::from(logits[token as usize]).exp();
    let total: f64 = (0..5000).map(weight).sum();
    let mut sum = 0.0;
    let kept = order.iter().take_while(|&&t| {
        let below = sum < 0.5 * total;
        sum += weight(t);
        below
    });
    let kept: BTreeSet<u32> = kept.copied().collect();
    let drawn: BTreeSet<u32> = (0..20_000).map(|i| choose(&logits, &sampling, i)).collect();
    assert!(drawn.is_subset(&kept));
    assert!(drawn.len() > kept.len() * 9 / 10);
}

#[test]
fn penalties_count_what_was_generated_and_repetition_the_prompt_too() {
    // Prompt: 0. Generated: 1, 1.
    let repeats = Sampling {
        repetition_penalty: 2.0,
        ..neutral()
    };
    let history = History::new(&[0, 1, 1], 1, &repeats);
    let logits = [1.0, 1.2, 0.9, -1.0];
    let with = |sampling: Sampling| {
        let mut adjusted = logits;
        adjust(&mut adjusted, &sampling, &Stop::default(), &history, 0);
        adjusted
    };
    let presence = with(Sampling {
        presence_penalty: 0.5,
        ..neutral()
    });
    assert_eq!(presence, [1.0, 1.2 - 0.5, 0.9, -1.0]);
    let frequency = with(Sampling {
        frequency_penalty: 0.25,
        ..neutral()
    });
    assert_eq!(frequency, [1.0, 1.2 - 0.5, 0.9, -1.0]);
    let repetition = with(repeats.clone());
    assert_eq!(repetition, [0.5, 0.6, 0.9, -1.0]);
    let negative = History::new(&[3], 1, &repeats);
    let mut adjusted = logits;
    adjust(&mut adjusted, &repeats, &Stop::default(), &negative, 0);
    assert_eq!(adjusted, [1.0, 1.2, 0.9, -2.0]);
}

#[test]
fn bias_moves_tokens_and_reports_the_models_own_logprob() {
    let sampling = Sampling {
        logit_bias: vec![(2, 100.0)],
        top_logprobs: Some(1),
        ..greedy()
    };
    let logits = logits_of(&[0.7, 0.2, 0.1]);
    let token = Sampler::default()
        .choose(&logits, &sampling, &Stop::default(), &History::default(), 4)
        .unwrap();
    assert_eq!((token.token, token.index), (2, 4));
    assert!((token.logprob.unwrap() - 0.1f32.ln()).abs() < 1e-5);
    assert_eq!(token.top[0].0, 0);
}

#[test]
fn absurd_settings_still_give_a_possible_token() {
    let history = History::new(&[0, 1, 1], 1, &neutral());
    let absurd = [
        Sampling {
            frequency_penalty: f32::MIN,
            ..neutral()
        },
        Sampling {
            presence_penalty: f32::MAX,
            frequency_penalty: f32::MIN,
            ..neutral()
        },
        Sampling {
            logit_bias: vec![(0, f32::MAX), (1, f32::MAX)],
            ..neutral()
        },
        Sampling {
            temperature: f32::MIN_POSITIVE,
            ..neutral()
        },
        Sampling {
            temperature: f32::MAX,
            ..neutral()
        },
    ];
    for sampling in absurd {
        choose_with(
            &[f32::MAX, 1.0, -3.0],
            &sampling,
            &Stop::default(),
            &history,
            0,
        );
    }
}

#[test]
fn stop_tokens_wait_for_min_tokens() {
    let stop = Stop {
        tokens: vec![1],
        max_tokens: 9,
        min_tokens: 2,
    };
    let logits = [0.0, 9.0, 1.0];
    let at = |index| choose_with(&logits, &greedy(), &stop, &History::default(), index);
    assert_eq!([at(0), at(1), at(2)], [2, 2, 1]);
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    let mut sampler = Sampler::default();
    let mut try_ = |logits: &[f32]| {
        sampler.choose(logits, &neutral(), &Stop::default(), &History::default(), 0)
    };
    assert_eq!(try_(&[0.0, f32::NAN]), Err(BadLogits::NotANumber));
    assert_eq!(try_(&[f32::INFINITY, 0.0]), Err(BadLogits::NotANumber));
    assert_eq!(try_(&[f32::NEG_INFINITY; 3]), Err(BadLogits::Empty));
}

proptest! {
    #[test]
    fn a_token_depends_on_seed_and_index_only_and_is_possible(
        logits in prop::collection::vec(-20f32..20.0, 1..300),
        temperature in 0.01f32..3.0,
        top_p in 0.01f32..=1.0,
        top_k in 0u32..50,
        min_p in 0f32..=1.0,
        seed: u64,
        index in 0usize..100_000,
    ) {
        let sampling = Sampling { temperature, top_p, top_k, min_p, seed, ..neutral() };
        let mut used = Sampler::default();
        let stop = Stop::default();
        used.choose(&[1.0, 2.0], &neutral(), &stop, &History::default(), 3).unwrap();
        let again = used.choose(&logits, &sampling, &stop, &History::default(), index).unwrap().token;
        let token = choose(&logits, &sampling, index);
        prop_assert_eq!(token, again);
        let better = logits.iter().filter(|&&x| x > logits[token as usize]).count();
        prop_assert!(top_k == 0 || better < top_k as usize);
    }
}
