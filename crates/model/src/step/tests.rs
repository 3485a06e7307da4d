use super::*;

fn bounds() -> Bounds {
    let limits = Limits {
        max_tokens: 300,
        max_sequences: 4,
        max_context: 640,
        max_expanded_context: 512,
        expanded_from: EXPANDED_FROM,
        max_states: 2,
        mtp: true,
    };
    Bounds {
        limits,
        vocab_size: 100,
        blocks: 20,
    }
}

fn sequence<'a>(tokens: &'a [u32], first: usize, blocks: &'a [u32]) -> Sequence<'a> {
    let logits = tokens.len() - 1..tokens.len();
    Sequence {
        tokens,
        first,
        blocks,
        form: Form::Absorbed,
        logits,
        state: None,
    }
}

#[test]
fn form_depends_on_the_sequence_alone() {
    let limits = bounds().limits;
    assert_eq!(limits.form(255, 255), Form::Absorbed);
    assert_eq!(limits.form(256, 256), Form::Expanded);
    assert_eq!(limits.form(256, 512), Form::Expanded);
    assert_eq!(limits.form(256, 513), Form::Absorbed);
}

#[test]
fn absorbed_sequences_stand_first_and_logits_keep_the_given_order() {
    let (a, b) = ([1, 2, 3], [4, 5]);
    let expanded = Sequence {
        form: Form::Expanded,
        ..sequence(&a, 64, &[7, 9])
    };
    let mut plan = Plan::default();
    plan.lay_out(&[expanded, sequence(&b, 0, &[3])], &bounds())
        .unwrap();
    assert_eq!(plan.tokens, [4, 5, 1, 2, 3]);
    assert_eq!(plan.positions, [0, 1, 64, 65, 66]);
    assert_eq!(plan.slots, [192, 193, 576, 577, 578]);
    assert_eq!(
        (
            &plan.absorbed.query_start[..],
            &plan.absorbed.context_len[..]
        ),
        (&[0, 2][..], &[2][..])
    );
    assert_eq!(plan.expanded_count, 1);
    let group = &plan.expanded[0];
    assert_eq!(
        (&group.query_start[..], &group.context_len[..]),
        (&[2, 5][..], &[67][..])
    );
    assert_eq!(group.block_table, [7, 9, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(plan.logits, [4, 1]);
    assert!(plan.mtp.states.is_empty() && plan.keep_from.is_empty());
}

#[test]
fn mtp_entries_lag_one_token_behind() {
    let state = |previous| Some(State { row: 1, previous });
    let mut plan = Plan::default();
    let prompt = Sequence {
        state: state(false),
        ..sequence(&[10, 11, 12], 0, &[2])
    };
    plan.lay_out(&[prompt], &bounds()).unwrap();
    assert_eq!(
        (&plan.mtp.states[..], &plan.mtp.tokens[..]),
        (&[0, 1][..], &[11, 12][..])
    );
    assert_eq!(
        (&plan.mtp.positions[..], &plan.mtp.slots[..]),
        (&[0, 1][..], &[128, 129][..])
    );
    assert_eq!(
        (&plan.keep_from[..], &plan.keep_to[..]),
        (&[2][..], &[301][..])
    );
    let next = Sequence {
        state: state(true),
        ..sequence(&[13], 3, &[2])
    };
    plan.lay_out(&[next], &bounds()).unwrap();
    assert_eq!(
        (&plan.mtp.states[..], &plan.mtp.tokens[..]),
        (&[301][..], &[13][..])
    );
    assert_eq!(
        (&plan.mtp.positions[..], &plan.mtp.slots[..]),
        (&[2][..], &[130][..])
    );
    let pending = Pending {
        row: 1,
        token: 14,
        position: 3,
        blocks: &[2],
    };
    plan.lay_out_pending(&[pending], &bounds()).unwrap();
    assert_eq!(
        (&plan.mtp.states[..], &plan.mtp.slots[..]),
        (&[301][..], &[131][..])
    );
}

#[test]
fn steps_that_break_a_rule_are_refused() {
    let many = vec![1; 301];
    let long = vec![0; 10];
    let ok = sequence(&[1], 0, &[0]);
    for (bad, says) in [
        (sequence(&[100], 0, &[0]), "token 100 is not below 100"),
        (sequence(&[1], 64, &[0]), "1 blocks do not hold 65 tokens"),
        (sequence(&[1], 640, &long), "641 tokens are more than 640"),
        (sequence(&[1], usize::MAX, &long), "more than 640"),
        (sequence(&[1], 0, &[20]), "block 20 is not below 20"),
        (sequence(&many, 0, &long), "301 tokens are more than 300"),
        (
            Sequence {
                tokens: &[],
                logits: 0..0,
                ..ok.clone()
            },
            "no new token",
        ),
        (
            Sequence {
                logits: 0..2,
                ..ok.clone()
            },
            "logits of 0..2 of 1",
        ),
        (
            Sequence {
                form: Form::Expanded,
                ..sequence(&[1], 512, &long)
            },
            "too many to expand",
        ),
        (
            Sequence {
                state: Some(State {
                    row: 2,
                    previous: false,
                }),
                ..ok.clone()
            },
            "state row 2",
        ),
    ] {
        let error = Plan::default()
            .lay_out(&[bad], &bounds())
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    assert!(Plan::default().lay_out(&[], &bounds()).is_err());
    assert!(Plan::default().lay_out(&vec![ok; 5], &bounds()).is_err());
}
