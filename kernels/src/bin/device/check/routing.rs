//! The gate, dispatch, permutation and combine.

use kernels::cases::moe::{Gate, Gated, Moved, Moves, V3};
use kernels::cases::{Error, floats};
use kernels::cuda::probe::Kind;
use kernels::cuda::routing::{self, Order, Rows};

use super::{Case, Found, Ran};
use crate::harness::{Harness, Result};

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, shape, inputs, tokens) in Gate::list() {
        let gate = move || Gate::new(shape, tokens, inputs);
        cases.push(Case::shared(name, gate, |h, case| {
            let (out, again) = (run_gate(h, case)?, run_gate(h, case)?);
            Ok(Ran {
                repeats: out == again,
                out,
                wrong: 0,
            })
        }));
    }
    cases.push(Case::new("gate NaN shows".into(), gate_nan));
    for (tokens, slots) in Moves::SIZES {
        let name = format!("dispatch permute combine tokens {tokens} slots {slots}");
        cases.push(Case::shared(name, move || Moves::new(tokens, slots), moves));
    }
    cases
}

fn run_gate(h: &Harness, case: &Gate) -> Result<Gated> {
    let (tokens, shape) = (case.tokens, case.shape);
    let (logits, bias) = (h.upload(&case.logits)?, h.upload(&case.bias)?);
    let chosen = h.poisoned::<i32>(tokens * shape.top_k)?;
    let weights = h.poisoned::<f32>(tokens * shape.top_k)?;
    let counts = h.upload(&vec![0; shape.experts])?;
    let out = (h.span(&chosen), h.span(&weights));
    let (logits, bias) = (h.span(&logits), h.span(&bias));
    routing::gate(
        &h.gpu,
        &h.stream,
        shape,
        logits,
        bias,
        tokens,
        out,
        h.span(&counts),
        false,
    )?;
    Ok(Gated {
        experts: h.download(&chosen)?,
        weights: h.download(&weights)?,
        counts: h.download(&counts)?,
    })
}

fn gate_nan(h: &Harness) -> Result<Found> {
    let mut case = Gate {
        shape: V3,
        tokens: 2,
        logits: vec![0.25; 2 * V3.experts],
        bias: vec![0.0; V3.experts],
    };
    case.logits[V3.experts + 77] = f32::NAN;
    let weights = run_gate(h, &case)?.weights;
    let hidden = weights[V3.top_k..].iter().filter(|w| !w.is_nan()).count();
    let spread = weights[..V3.top_k].iter().filter(|w| w.is_nan()).count();
    Ok(Found::new(&Error::default(), 0.0, true, hidden + spread))
}

fn moves(h: &Harness, case: &Moves) -> Result<Ran<Moved>> {
    const TOP_K: usize = Moves::TOP_K;
    const COLS: usize = Moves::COLS;
    let (tokens, slots) = (case.tokens, case.slots);
    let copies = tokens * TOP_K;
    let (chosen, table) = (h.upload(&case.chosen)?, h.upload(&case.table)?);
    let offsets = h.poisoned::<i32>(slots + 1)?;
    let (copy_of_row, row_of_copy) = (h.poisoned::<i32>(copies)?, h.poisoned::<i32>(copies)?);
    let spans = Order {
        offsets: h.span(&offsets),
        copy_of_row: h.span(&copy_of_row),
        row_of_copy: h.span(&row_of_copy),
    };
    let lookup = (h.span(&table), Moves::WIDTH);
    routing::dispatch(
        &h.gpu,
        &h.stream,
        h.span(&chosen),
        tokens,
        TOP_K,
        lookup,
        slots,
        spans,
        false,
    )?;

    let (ld, ld_to) = (tokens.next_multiple_of(4), copies.next_multiple_of(4));
    let from = h.random::<u8>(tokens * COLS, Kind::Fp8Normal, 100.0, 1)?;
    let scales = h.random::<f32>(COLS / 128 * ld, Kind::F32Scale, 0.01, 2)?;
    let (to, scales_to) = (
        h.poisoned::<u8>(copies * COLS)?,
        h.poisoned::<f32>(COLS / 128 * ld_to)?,
    );
    let rows_from = Rows {
        data: h.span(&from),
        scales: h.span(&scales),
        ld,
    };
    let rows_to = Rows {
        data: h.span(&to),
        scales: h.span(&scales_to),
        ld: ld_to,
    };
    routing::permute(
        &h.gpu,
        &h.stream,
        rows_from,
        h.span(&copy_of_row),
        copies,
        TOP_K,
        COLS,
        rows_to,
        false,
    )?;
    let (from, to) = (h.download(&from)?, h.download(&to)?);
    let (scales, scales_to) = (h.download(&scales)?, h.download(&scales_to)?);
    let mut wrong = 0;
    for (r, c) in case.order().into_iter().enumerate() {
        let t = c / TOP_K;
        wrong += usize::from(to[r * COLS..][..COLS] != from[t * COLS..][..COLS]);
        wrong += (0..COLS / 128)
            .filter(|b| scales_to[b * ld_to + r] != scales[b * ld + t])
            .count();
    }

    let (y, shared) = (h.upload(&case.y)?, h.upload(&case.shared)?);
    let weights = h.upload(&case.weights)?;
    let out = h.poisoned::<u16>(tokens * COLS)?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        routing::combine(
            &h.gpu,
            &h.stream,
            h.span(&y),
            h.span(&weights),
            h.span(&row_of_copy),
            Some(h.span(&shared)),
            tokens,
            TOP_K,
            COLS,
            h.span(&out),
            false,
        )?;
        *digest = h.digest(&out)?;
    }
    let out = h.download(&out)?;
    wrong += out.iter().filter(|&&v| v == 0xffff).count();
    Ok(Ran {
        out: Moved {
            offsets: h.download(&offsets)?,
            copy_of_row: h.download(&copy_of_row)?,
            row_of_copy: h.download(&row_of_copy)?,
            out: floats(&out),
        },
        repeats: digests[0] == digests[1],
        wrong,
    })
}
