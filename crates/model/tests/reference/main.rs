//! The network against float64 and Hugging Face, on the checkpoints of `tests/reference/fixtures` (see
//! `make_fixtures.py` there), and against itself: forms, chunks, prefixes and batch mates.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod distance;
mod fixture;
mod run;

use distance::Distance;
use fixture::Fixture;
use kernels::Precision;
use model::Form;
use run::{Runner, close};

/// The float32 pass line, absolute, in every position.
const F32_LINE: f32 = 1e-4;

const ALL: [&str; 5] = ["f32", "bf16", "bf16-plain", "fp8", "fp8-ue8m0"];

#[test]
fn float32_logits_and_caches_are_within_the_line_in_both_forms() {
    for name in ALL {
        let fixture = Fixture::open(name);
        for form in [Form::Absorbed, Form::Expanded] {
            let mut runner = Runner::new(&fixture, Precision::F32);
            let logits = runner.whole(&fixture.tokens, form);
            close(
                &logits,
                &fixture.f32("logits"),
                F32_LINE,
                &format!("{name} {form:?} logits"),
            );
            for (layer, (latent, rope)) in runner
                .cache_entries(fixture.tokens.len())
                .iter()
                .enumerate()
            {
                // The MTP layer's entry of the last token waits for the token after it.
                for (part, entries) in [("latent", latent), ("rope_key", rope)] {
                    let expected = fixture.f32(&format!("layer.{layer}.{part}"));
                    let what = format!("{name} {form:?} layer {layer} {part}");
                    close(&entries[..expected.len()], &expected, F32_LINE, &what);
                }
            }
        }
    }
}

#[test]
fn float32_gate_choices_and_counts_are_those_of_float64() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let mut runner = Runner::new(&fixture, Precision::F32);
        runner.whole(&fixture.tokens, Form::Absorbed);
        let experts = runner.network.config().moe.as_ref().unwrap().gate.experts;
        for (layer, (ids, weights)) in &runner.routing {
            assert_eq!(
                ids,
                &fixture.i32(&format!("layer.{layer}.topk_ids")),
                "{name} {layer}"
            );
            let expected = fixture.f32(&format!("layer.{layer}.topk_weights"));
            close(
                weights,
                &expected,
                F32_LINE,
                &format!("{name} {layer} weights"),
            );
        }
        let mut layers = 0;
        let Runner {
            network,
            scratch,
            routing,
            ..
        } = &mut runner;
        network
            .take_expert_counts(scratch, &mut |layer, counts| {
                let mut expected = vec![0; experts];
                // The MTP layer routes nothing before something is drafted.
                let ids = routing.get(&layer).into_iter().flat_map(|(ids, _)| ids);
                ids.for_each(|&id| expected[id as usize] += 1);
                assert_eq!(counts, expected, "{name} {layer}");
                layers += usize::from(routing.contains_key(&layer));
            })
            .unwrap();
        assert_eq!(layers, routing.len());
        let mut total = 0;
        network
            .take_expert_counts(scratch, &mut |_, c| total += c.iter().sum::<u32>())
            .unwrap();
        assert_eq!(total, 0, "counts start from zero after they are taken");
    }
}

#[test]
fn float32_greedy_tokens_are_those_of_float64_over_64_steps() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let mut runner = Runner::new(&fixture, Precision::F32);
        let generated = runner.generate(&fixture.tokens[..24], 64);
        let expected: Vec<u32> = fixture.i32("generated").iter().map(|&t| t as u32).collect();
        assert_eq!(generated, expected, "{name}");
    }
}

/// Prints and checks, over all checkpoints together, the distance to `judge` beside the yardstick's distance to it:
/// quantiles of the logit difference (in units of the logits' deviation), equal best tokens, equal expert sets. Together,
/// because in a random network a single expert at a tie can carry a position away, on either side.
fn no_further_than_hf(names: &[&str], precision: Precision, judge: &str, yardstick: &str) {
    for form in [Form::Absorbed, Form::Expanded] {
        let (mut ours, mut theirs) = (Distance::default(), Distance::default());
        for name in names {
            let fixture = Fixture::open(name);
            let mut runner = Runner::new(&fixture, precision);
            let logits = runner.whole(&fixture.tokens, form);
            let config = runner.network.config();
            let exact = fixture.f32(&format!("{judge}logits"));
            ours.add_logits(&logits, &exact, config.vocab_size);
            let yardstick_logits = fixture.f32(&format!("{yardstick}logits"));
            theirs.add_logits(&yardstick_logits, &exact, config.vocab_size);
            let top_k = config.moe.as_ref().unwrap().gate.top_k;
            for (layer, (ids, _)) in &runner.routing {
                let of = |by| fixture.i32(&format!("{by}layer.{layer}.topk_ids"));
                ours.add_experts(ids, &of(judge), top_k);
                theirs.add_experts(&of(yardstick), &of(judge), top_k);
            }
        }
        let what =
            format!("{precision:?} {form:?}\n  Hadal        {ours}\n  Hugging Face {theirs}");
        println!("{what}");
        assert!(ours.is_no_further_than(&theirs), "{what}");
    }
}

#[test]
fn bf16_is_no_further_from_float64_than_hugging_face() {
    no_further_than_hf(&ALL, Precision::Bf16, "", "hf_bf16.");
}

#[test]
fn w8_is_no_further_from_float64_than_hugging_face_in_bf16() {
    no_further_than_hf(&["fp8", "fp8-ue8m0"], Precision::W8, "", "hf_bf16.");
}

#[test]
fn w8a8_is_no_further_from_its_float64_than_hugging_face_with_the_same_quantiser() {
    no_further_than_hf(&["fp8", "fp8-ue8m0"], Precision::W8A8, "w8a8.", "hf_w8a8.");
}

#[test]
fn chunks_prefixes_and_batch_mates_change_no_bit_within_a_form() {
    for (name, precision) in [
        ("f32", Precision::F32),
        ("bf16", Precision::Bf16),
        ("fp8", Precision::W8A8),
    ] {
        let fixture = Fixture::open(name);
        let tokens = &fixture.tokens;
        for form in [Form::Absorbed, Form::Expanded] {
            let whole = Runner::new(&fixture, precision).whole(tokens, form);
            for cuts in [&[64][..], &[1, 2, 128], &[30, 65]] {
                let chunked = Runner::new(&fixture, precision).chunked(tokens, cuts, form);
                assert_eq!(whole, chunked, "{name} {form:?} {cuts:?}");
            }
            let beside = Runner::new(&fixture, precision).beside_others(tokens, form);
            assert_eq!(whole, beside, "{name} {form:?} beside others");
        }
    }
}

#[test]
fn a_prefix_in_the_cache_serves_another_sequence() {
    let fixture = Fixture::open("fp8");
    let mut runner = Runner::new(&fixture, Precision::W8A8);
    let whole = runner.whole(&fixture.tokens, Form::Absorbed);
    // The first block stays where the first sequence put it; the second is another one.
    let vocab = runner.network.config().vocab_size;
    let resumed = runner.step(&fixture.tokens[64..], 64, &[0, 7, 8], Form::Absorbed);
    assert_eq!(resumed, whole[64 * vocab..]);
}

#[test]
fn mtp_drafts_are_those_of_float64() {
    for name in ["f32", "bf16", "fp8"] {
        let fixture = Fixture::open(name);
        let drafts = Runner::new(&fixture, Precision::F32).drafts(&fixture.tokens);
        let vocab = fixture.f32("mtp_logits").len() / (fixture.tokens.len() - 1);
        close(
            &drafts,
            &fixture.f32("mtp_logits")[110 * vocab..],
            F32_LINE,
            name,
        );
    }
}

#[test]
fn precisions_that_need_fp8_weights_are_refused_without_them() {
    let fixture = Fixture::open("bf16");
    let error = Runner::try_new(&fixture, Precision::W8A8)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("needs a checkpoint with FP8 weights"),
        "{error}"
    );
}
