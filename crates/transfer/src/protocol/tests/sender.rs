//! A sender whatever fills and breaks.

use proptest::prelude::*;

use super::{PIECES, plan, truth};
use crate::{
    checksum,
    geometry::{Geometry, Plan},
    protocol::{Next, Retry, Sending, Watermarks},
};

/// A receiver as the sender's tests need it: what it has, by part.
fn run_sender(
    plan: Plan,
    fills: &[(u32, u32)],
    breaks: &[usize],
    max_bytes: usize,
) -> (Vec<bool>, u64) {
    let mut sending = Sending::new(plan, 7);
    let mut filled = Watermarks::new(plan.geometry.layers);
    let mut has = vec![false; plan.parts()];
    let layers = plan.geometry.layers as usize;
    let mut fills = fills.iter();
    assert!(sending.opened(&vec![0; plan.blocks().len()]));
    for step in 0.. {
        assert!(step < 10_000, "the sender never ends");
        if breaks.contains(&step) {
            let _ = sending.broken();
            let have: Vec<u32> = has
                .chunks(layers)
                .map(|block| block.iter().take_while(|here| **here).count() as u32)
                .collect();
            for (block, have) in has.chunks_mut(layers).zip(&have) {
                block[*have as usize..].fill(false);
            }
            assert!(sending.opened(&have));
        }
        match sending.next(&filled, max_bytes) {
            Next::Piece(piece) => {
                assert!(plan.holds(&piece), "{piece:?} outside {plan:?}");
                let sums: Vec<u64> = piece.layer_range().map(truth).collect();
                for layer in piece.layer_range() {
                    assert!(
                        filled.get(layer) >= plan.end(piece.block),
                        "sent before filled"
                    );
                    let part = &mut has[plan.part(piece.block, layer)];
                    assert!(!*part, "sent twice");
                    *part = true;
                }
                sending.sent(&piece, &sums);
            }
            Next::Seal(sum) => return (has, sum),
            Next::Wait => match fills.next() {
                Some((layer, end)) => {
                    filled.raise(*layer as usize..*layer as usize + 1, *end);
                }
                None => {
                    filled.raise(0..layers, plan.total_tokens);
                }
            },
        }
    }
    unreachable!()
}

proptest! {
    #[test]
    fn a_sender_sends_every_part_once_whatever_fills_and_breaks(
        layers in 1u32..5,
        total_tokens in 1u32..40,
        first_block in 0u32..4,
        fills in proptest::collection::vec((0u32..5, 0u32..45), 0..30),
        breaks in proptest::collection::vec(0usize..60, 0..5),
        max_bytes in 1usize..64,
    ) {
        let geometry = Geometry { layers, block_tokens: 8, token_bytes: 2 };
        let plan = Plan { geometry, first_block, total_tokens };
        let fills: Vec<_> =
            fills.into_iter().map(|(layer, end)| (layer, end.min(total_tokens))).collect();
        let (has, sum) = run_sender(plan, &fills, &breaks, max_bytes);
        prop_assert!(has.iter().all(|here| *here));
        let expected = plan.blocks().flat_map(|_| (0..layers).map(truth));
        prop_assert_eq!(sum, checksum::seal(7, expected));
    }
}

#[test]
fn a_receiver_that_claims_what_was_never_sent_is_not_believed() {
    let mut sending = Sending::new(plan(), 7);
    assert!(!sending.opened(&[1]));
    assert!(!sending.opened(&[0, 0]));
    assert!(!sending.opened(&[9]));
    assert!(sending.opened(&[0]));
}

#[test]
fn fruitless_streams_end_and_progress_forgives() {
    let mut sending = Sending::new(plan(), 7);
    let mut pauses = vec![];
    for _ in 0..6 {
        let Retry::After(pause) = sending.broken() else {
            panic!("gave up early")
        };
        pauses.push(pause);
    }
    assert!(pauses.windows(2).all(|two| two[1] == two[0] * 2));
    sending.sent(&PIECES[0], &[truth(0)]);
    assert!(sending.opened(&[1]));
    assert_eq!(sending.broken(), Retry::After(pauses[0]));
    for _ in 0..5 {
        let _ = sending.broken();
    }
    assert_eq!(sending.broken(), Retry::GiveUp);
}
