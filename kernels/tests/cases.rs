//! The cases of the CUDA kernels' checks, on the CPU backend.

use kernels::cases::attention::{Absorbed, Expanded};
use kernels::cases::cache::{CacheWrite, Rope};
use kernels::cases::gemm::{Gemm, Grouped};
use kernels::cases::moe::{Gate, Moves};
use kernels::cases::rows::{AddNorm, Quantise, Swiglu};
use kernels::cases::{Judged, Operation};
use kernels::cpu::Cpu;

/// Runs the cases that take the CPU a moment at most, by the oracle and by the fast path.
fn right<O: Operation>(cases: impl IntoIterator<Item = (String, O)>) {
    let mut ran = 0;
    for (name, case) in cases.into_iter().filter(|(_, case)| case.work() < 5e7) {
        for cpu in [Cpu::reference(), Cpu::new(2)] {
            let out = case.cpu(&cpu).expect(&name);
            let Judged { error, wrong } = case.judge(&out);
            assert!(
                error <= O::CPU_BOUND && wrong == 0,
                "{name}, {cpu:?}: error {error:e}, {wrong} wrong"
            );
        }
        ran += 1;
    }
    assert!(ran >= 2, "no cases small enough");
}

#[test]
fn norms_and_activations_and_quantising() {
    let norms = AddNorm::list()
        .into_iter()
        .map(|(rows, cols, delta, format)| {
            let name = format!("add_norm {rows} {cols} {delta} {format:?}");
            (name, AddNorm::new(rows, cols, delta, format))
        });
    right(norms);
    let activations = Swiglu::list()
        .into_iter()
        .map(|(rows, cols, masked, format)| {
            let name = format!("swiglu {rows} {cols} {masked} {format:?}");
            (name, Swiglu::new(rows, cols, masked, format))
        });
    right(activations);
    let quantised = Quantise::list().map(|(rows, cols, format)| {
        let name = format!("quantise {rows} {cols} {format:?}");
        (name, Quantise::new(rows, cols, format))
    });
    right(quantised);
}

#[test]
fn rotary_embedding_and_cache_writes() {
    let rope = |(rows, heads)| (format!("rope {rows} {heads}"), Rope::new(rows, heads));
    right(Rope::SIZES.map(rope));
    let write = |(rows, _)| (format!("cache_write {rows}"), CacheWrite::new(rows));
    right(Rope::SIZES.map(write));
}

#[test]
fn attention_over_the_paged_cache() {
    let shapes = [(16, 1), (32, 2), (128, 1)];
    let cases = shapes.into_iter().flat_map(|(heads, queries)| {
        let case = move |(name, lengths): (_, Vec<usize>)| {
            let name = format!("mla_decode heads {heads} queries {queries} {name}");
            (name, lengths)
        };
        let small = |(_, lengths): &(_, Vec<usize>)| lengths.iter().sum::<usize>() < 1000;
        let lists = Absorbed::lengths().into_iter().map(case).filter(small);
        lists.map(move |(name, lengths)| (name, Absorbed::new(heads, queries, lengths)))
    });
    right(cases);
}

#[test]
fn attention_over_expanded_keys() {
    let small = |(_, _, list): &(_, _, Vec<(usize, usize)>)| list.iter().all(|l| l.1 < 150);
    let case = |(name, heads, list)| (format!("mla_prefill {name}"), Expanded::new(heads, list));
    let lists = Expanded::lists().into_iter().filter(small).map(case);
    right(lists.chain([("mla_prefill broken tokens".to_owned(), Expanded::broken())]));
}

#[test]
fn the_gate_and_the_order_of_copies() {
    let gate = |(name, shape, inputs, tokens)| (name, Gate::new(shape, tokens, inputs));
    right(Gate::list().into_iter().map(gate));
    let small = Moves::SIZES
        .into_iter()
        .filter(|(tokens, _)| *tokens < 1000);
    let moves = |(tokens, slots)| (format!("{tokens} tokens"), Moves::new(tokens, slots));
    right(small.map(moves));
}

#[test]
fn products_of_fp8_blocks() {
    // Large weights are not even made.
    let small = Gemm::list().filter(|(m, n, k)| m * n * k < 50_000_000);
    right(small.map(|(m, n, k)| (format!("fp8 {m} x {n} x {k}"), Gemm::new(m, n, k))));
    right(
        [(512, 128), (256, 128)].map(|(n, k)| (format!("experts {n} x {k}"), Grouped::new(n, k))),
    );
}
