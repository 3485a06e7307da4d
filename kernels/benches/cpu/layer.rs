//! Every operation of one MoE layer of the demo network.

use kernels::backend::{Columns, Input, Output, ScaleFormat, Sequences};
use kernels::cpu::Cpu;
use kernels::{Backend, DType, Precision};

use crate::experts::experts;
use crate::host::{Host, ints, quantised, tensor, values};
use crate::timing::race;

pub(crate) const HIDDEN: usize = 256;
pub(crate) const HEADS: usize = 8;
pub(crate) const NOPE: usize = 32;
pub(crate) const ROPE: usize = 32;
pub(crate) const VALUE: usize = 32;
pub(crate) const LATENT: usize = 128;
pub(crate) const Q_RANK: usize = 128;
pub(crate) const EXPERTS: usize = 64;
pub(crate) const INTER: usize = 64;
pub(crate) const TOP_K: usize = 8;

/// An operation by name.
pub(crate) type Step = (&'static str, Box<dyn FnMut()>);

/// Times every operation of a layer, `rows` sequences of `context` tokens each (or one sequence of `rows` new tokens
/// where there are as many as the context).
pub(crate) fn layer(rows: usize, context: usize, threads: usize, only: &str) {
    let mut fast = steps(&Cpu::new(threads), rows, context);
    let mut slow = steps(&Cpu::reference(), rows, context);
    let mut total = [0.0; 2];
    for (fast, slow) in fast
        .iter_mut()
        .zip(&mut slow)
        .filter(|(step, _)| step.0.contains(only))
    {
        let times = race(&mut [&mut fast.1, &mut slow.1]);
        total[0] += times[0];
        total[1] += times[1];
        println!(
            "{:40} {rows:>5} {:>10.1} {:>12.1}",
            fast.0,
            times[0],
            times[1] / times[0]
        );
    }
    println!(
        "{:40} {rows:>5} {:>10.1} {:>12.1}  (context {context})\n",
        "all",
        total[0],
        total[1] / total[0]
    );
}

/// The operations by name.
fn steps(cpu: &Cpu, rows: usize, context: usize) -> Vec<Step> {
    let width = LATENT + ROPE;
    let (count, queries) = if rows == context {
        (1, rows)
    } else {
        (rows, 1)
    };
    let blocks = context.div_ceil(64);
    let table: Vec<i32> = (0..(count * blocks) as i32).collect();
    let sequences = || Sequences {
        query_start: ints(
            cpu,
            1,
            &(0..=count)
                .map(|s| (s * queries) as i32)
                .collect::<Vec<_>>(),
        ),
        context_len: ints(cpu, 1, &vec![context as i32; count]),
        block_table: ints(cpu, blocks, &table),
        slots: ints(
            cpu,
            1,
            &(0..rows)
                .map(|t| (t / queries * blocks * 64 + t % queries) as i32)
                .collect::<Vec<_>>(),
        ),
        positions: ints(
            cpu,
            1,
            &(0..rows)
                .map(|t| (context - queries + t % queries) as i32)
                .collect::<Vec<_>>(),
        ),
        count,
        max_query: queries,
        max_context: context,
    };
    let act = |cols: usize| tensor(cpu, cols, &values(rows * cols));
    let linear = |n: usize, k: usize| {
        let host = Host::new(DType::Fp8, n, k);
        cpu.linear(&[host.matrix()], Precision::W8A8)
            .expect("weights")
    };
    let quantised = |cols: usize| quantised(cpu, cols, &values(rows * cols));
    let head_weights = |out: usize, inp: usize| {
        cpu.heads(HEADS, out, inp, &values(HEADS * out * inp), Precision::Bf16)
            .expect("weights")
    };
    let mut all: Vec<Step> = Vec::new();
    let mut products = |name: &'static str, n: usize, k: usize| {
        let (cpu, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
        let (x, w, mut out) = (quantised(k), linear(n, k), act(n));
        all.push((
            name,
            Box::new(move || {
                cpu.matmul(&mut stream, Input::Quantised(&x), &w, rows, &mut out)
                    .expect("product");
            }),
        ));
    };
    products("q_a | kv_a", Q_RANK + width, HIDDEN);
    products("q_b", HEADS * (NOPE + ROPE), Q_RANK);
    products("o_proj", HIDDEN, HEADS * VALUE);
    products("shared gate | up", 2 * INTER, HIDDEN);
    products("shared down", HIDDEN, INTER);

    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (mut residual, delta, weight, mut q) = (
        act(HIDDEN),
        act(HIDDEN),
        tensor(cpu, HIDDEN, &values(HIDDEN)),
        quantised(HIDDEN),
    );
    all.push((
        "add + norm + quantise (of two)",
        Box::new(move || {
            let to = Output {
                plain: None,
                quantised: Some((&mut q, ScaleFormat::F32)),
            };
            c.add_norm(
                &mut stream,
                &mut residual,
                Some(&delta),
                &weight,
                1e-6,
                rows,
                to,
            )
            .expect("norm");
        }),
    ));
    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (x, mut q) = (act(2 * INTER), quantised(INTER));
    all.push((
        "swiglu + quantise (of two)",
        Box::new(move || {
            let to = Output {
                plain: None,
                quantised: Some((&mut q, ScaleFormat::F32)),
            };
            c.swiglu(&mut stream, &x, rows, to).expect("swiglu");
        }),
    ));
    let angles = tensor(cpu, ROPE, &values(context * ROPE));
    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (mut q, seqs) = (act(HEADS * (NOPE + ROPE)), sequences());
    all.push((
        "rope",
        Box::new(move || {
            c.rope(
                &mut stream,
                &mut q,
                HEADS,
                NOPE,
                ROPE,
                &angles,
                &seqs.positions,
                rows,
            )
            .expect("rope");
        }),
    ));
    let cache = cpu
        .cache(count * blocks, 1, width, DType::Bf16)
        .expect("memory");
    let angles = tensor(cpu, ROPE, &values(context * ROPE));
    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (kv, weight, seqs) = (
        act(width),
        tensor(cpu, LATENT, &values(LATENT)),
        sequences(),
    );
    all.push((
        "cache_write",
        Box::new(move || {
            let kv = Columns {
                tensor: &kv,
                first: 0,
                cols: width,
            };
            c.cache_write(
                &mut stream,
                kv,
                &weight,
                1e-6,
                &angles,
                &seqs,
                0,
                rows,
                &cache,
            )
            .expect("write");
        }),
    ));
    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (q, w, mut out) = (
        act(HEADS * (NOPE + ROPE)),
        head_weights(LATENT, NOPE),
        act(HEADS * width),
    );
    all.push((
        "absorb_query",
        Box::new(move || {
            c.absorb_query(&mut stream, &q, &w, rows, &mut out)
                .expect("absorb");
        }),
    ));
    let cache = cpu
        .cache(count * blocks, 1, width, DType::Bf16)
        .expect("memory");
    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (q, mut out, seqs) = (act(HEADS * width), act(HEADS * LATENT), sequences());
    all.push((
        "attend_absorbed",
        Box::new(move || {
            c.attend_absorbed(
                &mut stream,
                &q,
                &cache,
                0,
                &seqs,
                HEADS,
                0.1,
                rows,
                &mut out,
            )
            .expect("attend");
        }),
    ));
    let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
    let (x, w, mut out) = (
        act(HEADS * LATENT),
        head_weights(VALUE, LATENT),
        act(HEADS * VALUE),
    );
    all.push((
        "absorb_value",
        Box::new(move || {
            c.absorb_value(&mut stream, &x, &w, rows, &mut out)
                .expect("absorb");
        }),
    ));
    if count == 1 {
        let (c, mut stream) = (cpu.clone(), cpu.stream().expect("threads"));
        let kv = tensor(
            cpu,
            HEADS * (NOPE + VALUE),
            &values(context * HEADS * (NOPE + VALUE)),
        );
        let rope = tensor(cpu, ROPE, &values(context * ROPE));
        let (q, mut out, seqs, start) = (
            act(HEADS * (NOPE + ROPE)),
            act(HEADS * VALUE),
            sequences(),
            ints(cpu, 1, &[0]),
        );
        all.push((
            "attend_expanded (instead)",
            Box::new(move || {
                c.attend_expanded(
                    &mut stream,
                    &q,
                    &kv,
                    &rope,
                    &seqs,
                    &start,
                    HEADS,
                    0.1,
                    rows,
                    &mut out,
                )
                .expect("attend");
            }),
        ));
    }
    experts(cpu, rows, &mut all);
    all
}
