//! Speed of the CPU backend: `cargo bench -p kernels --bench cpu [-- [threads] [part of a name]]`.
//!
//! Products of the demo network's shapes and of slices of DeepSeek-V3's, against the reference and against a plain
//! float32 loop; then every operation of one MoE layer of the demo network. All variants of a line take turns within one
//! run, and the best of their rounds counts, so that ratios mean something on a shared machine.

use std::hint::black_box;
use std::time::Instant;

use kernels::backend::{
    Columns, Dispatch, GateShape, HostMatrix, Input, Output, Quantised, Routing, ScaleFormat,
    Sequences,
};
use kernels::cpu::{Cpu, Memory};
use kernels::{Backend, DType, Precision, Tensor, fp8};

/// Seconds that every variant of a line may take together.
const BUDGET: f64 = 0.4;

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let threads = args.iter().find_map(|a| a.parse().ok()).unwrap_or(2);
    let only = args
        .iter()
        .find(|a| a.parse::<usize>().is_err())
        .map_or("", String::as_str);
    println!("{threads} threads; us is the best of several rounds\n");
    println!(
        "{:34} {:>5} {:>10} {:>9} {:>8} {:>11} {:>8}",
        "product", "rows", "us", "GFLOP/s", "GB/s", "x reference", "x plain"
    );
    for (name, n, k) in [
        ("demo q_a|kv_a", 288, 256),
        ("demo o_proj", 256, 256),
        ("demo lm_head", 4096, 256),
        ("V3 q_a|kv_a", 2112, 7168),
        ("V3 expert down", 7168, 2048),
    ] {
        for (form, dtype, precision) in [
            ("f32", DType::F32, Precision::F32),
            ("bf16", DType::Bf16, Precision::Bf16),
            ("fp8", DType::Fp8, Precision::W8),
        ] {
            for rows in [1, 16, 128] {
                if !name.contains(only) {
                    continue;
                }
                product(
                    &format!("{name} {form} [{n}, {k}]"),
                    rows,
                    n,
                    k,
                    dtype,
                    precision,
                    threads,
                );
            }
        }
    }
    println!(
        "\n{:34} {:>5} {:>10} {:>12}",
        "one MoE layer of the demo network", "rows", "us", "x reference"
    );
    for (rows, context) in [(1, 256), (16, 256), (1, 4096), (256, 256)] {
        layer(rows, context, threads, only);
    }
}

/// Best time of each variant in microseconds; variants take turns.
fn race(variants: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; variants.len()];
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed().as_secs_f64() < BUDGET || rounds < 5 {
        rounds += 1;
        for (variant, best) in variants.iter_mut().zip(&mut best) {
            let begin = Instant::now();
            variant();
            *best = best.min(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    best
}

/// Repeatable values in -1..1.
fn values(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

struct Host {
    dtype: DType,
    rows: usize,
    cols: usize,
    data: Vec<u8>,
    scales: Vec<f32>,
}

impl Host {
    fn new(dtype: DType, rows: usize, cols: usize) -> Self {
        let values = values(rows * cols);
        Self {
            dtype,
            rows,
            cols,
            data: match dtype {
                DType::Fp8 => values.iter().map(|v| fp8::encode(*v * 400.0)).collect(),
                DType::Bf16 => values
                    .iter()
                    .flat_map(|v| v.to_le_bytes()[2..].to_vec())
                    .collect(),
                DType::F32 | DType::I32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            },
            scales: vec![0.0025; rows.div_ceil(fp8::BLOCK) * cols.div_ceil(fp8::BLOCK)],
        }
    }

    fn matrix(&self) -> HostMatrix<'_> {
        HostMatrix {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            data: &self.data,
            scales: (self.dtype == DType::Fp8).then_some(&self.scales),
        }
    }
}

fn product(
    name: &str,
    rows: usize,
    n: usize,
    k: usize,
    dtype: DType,
    precision: Precision,
    threads: usize,
) {
    let host = Host::new(dtype, n, k);
    let x = values(rows * k);
    let weights = values(n * k);
    let mut out = vec![0.0; rows * n];
    let mut plain = || {
        for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(n)) {
            for (w, out) in weights.chunks_exact(k).zip(out) {
                *out = x.iter().zip(w).map(|(x, w)| x * w).sum();
            }
        }
        black_box(&mut out);
    };
    let fast = Cpu::new(threads);
    let mut fast = matmul(&fast, &host, precision, rows, &x);
    let reference = Cpu::reference();
    let mut reference = matmul(&reference, &host, precision, rows, &x);
    // The reference takes seconds for the large ones: one row of it stands for all.
    let few = rows * n * k > 1 << 24;
    let times = if few {
        race(&mut [&mut fast])
    } else {
        race(&mut [&mut fast, &mut reference, &mut plain])
    };
    let macs = (rows * n * k) as f64;
    let ratio = |i: usize| {
        times
            .get(i)
            .map_or("-".into(), |t| format!("{:.1}", t / times[0]))
    };
    println!(
        "{name:34} {rows:>5} {:>10.1} {:>9.1} {:>8.1} {:>11} {:>8}",
        times[0],
        2.0 * macs / times[0] / 1e3,
        host.data.len() as f64 / times[0] / 1e3,
        ratio(1),
        ratio(2)
    );
}

fn matmul(cpu: &Cpu, host: &Host, precision: Precision, rows: usize, x: &[f32]) -> impl FnMut() {
    let weight = cpu.linear(&[host.matrix()], precision).expect("weights");
    let x = tensor(cpu, host.cols, x);
    let mut out = cpu.alloc(DType::F32, rows, host.rows).expect("memory");
    let mut stream = cpu.stream().expect("threads");
    let cpu = Cpu::clone(cpu);
    move || {
        cpu.matmul(&mut stream, Input::Plain(&x), &weight, rows, &mut out)
            .expect("product");
    }
}

fn tensor(cpu: &Cpu, cols: usize, values: &[f32]) -> Tensor<Memory> {
    cpu.import(
        DType::F32,
        values.len() / cols,
        cols,
        bytemuck::cast_slice(values),
    )
    .expect("memory")
}

fn ints(cpu: &Cpu, cols: usize, values: &[i32]) -> Tensor<Memory> {
    cpu.import(
        DType::I32,
        values.len() / cols,
        cols,
        bytemuck::cast_slice(values),
    )
    .expect("memory")
}

const HIDDEN: usize = 256;
const HEADS: usize = 8;
const NOPE: usize = 32;
const ROPE: usize = 32;
const VALUE: usize = 32;
const LATENT: usize = 128;
const Q_RANK: usize = 128;
const EXPERTS: usize = 64;
const INTER: usize = 64;
const TOP_K: usize = 8;

type Step = (&'static str, Box<dyn FnMut()>);

/// Times every operation of a layer, `rows` sequences of `context` tokens each (or one sequence of `rows` new tokens
/// where there are as many as the context).
fn layer(rows: usize, context: usize, threads: usize, only: &str) {
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
            "{:34} {rows:>5} {:>10.1} {:>12.1}",
            fast.0,
            times[0],
            times[1] / times[0]
        );
    }
    println!(
        "{:34} {rows:>5} {:>10.1} {:>12.1}  (context {context})\n",
        "all",
        total[0],
        total[1] / total[0]
    );
}

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
    let quantised = |cols: usize| {
        let mut q = Quantised {
            data: cpu.alloc(DType::Fp8, rows, cols).expect("memory"),
            scales: cpu
                .alloc(DType::F32, rows, cols.div_ceil(fp8::BLOCK))
                .expect("memory"),
        };
        let mut stream = cpu.stream().expect("threads");
        cpu.quantise(&mut stream, &act(cols), rows, ScaleFormat::F32, &mut q)
            .expect("quantise");
        q
    };
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

fn experts(cpu: &Cpu, rows: usize, all: &mut Vec<Step>) {
    let copies = rows * TOP_K;
    let act = |rows: usize, cols: usize| tensor(cpu, cols, &values(rows * cols));
    let routing = |stream: &mut _| {
        let shape = GateShape {
            experts: EXPERTS,
            groups: 8,
            top_groups: 4,
            top_k: TOP_K,
            scale: 2.5,
            normalise: true,
        };
        let mut out = Routing {
            experts: ints(cpu, TOP_K, &vec![0; copies]),
            weights: act(rows, TOP_K),
        };
        let (w, b, mut counts) = (
            act(EXPERTS, HIDDEN),
            act(1, EXPERTS),
            ints(cpu, 1, &[0; EXPERTS]),
        );
        cpu.gate(
            stream,
            &act(rows, HIDDEN),
            &w,
            &b,
            &shape,
            rows,
            &mut out,
            &mut counts,
        )
        .expect("gate");
        (out, w, b, counts, shape)
    };
    let slots = || {
        ints(
            cpu,
            2,
            &(0..EXPERTS as i32).flat_map(|e| [1, e]).collect::<Vec<_>>(),
        )
    };
    let dispatched = |stream: &mut _| {
        let mut out = Dispatch {
            offsets: ints(cpu, 1, &[0; EXPERTS + 1]),
            copy_of_row: ints(cpu, 1, &vec![0; copies]),
            row_of_copy: ints(cpu, 1, &vec![0; copies]),
        };
        let routing = routing(stream).0;
        cpu.dispatch(stream, &routing, &slots(), rows, EXPERTS, &mut out)
            .expect("dispatch");
        (out, routing)
    };
    let weights = || {
        let mut experts = cpu
            .experts(EXPERTS, HIDDEN, INTER, Precision::W8A8)
            .expect("weights");
        let up = Host::new(DType::Fp8, INTER, HIDDEN);
        let down = Host::new(DType::Fp8, HIDDEN, INTER);
        for slot in 0..EXPERTS {
            cpu.load_expert(
                &mut experts,
                slot,
                &up.matrix(),
                &up.matrix(),
                &down.matrix(),
            )
            .expect("weights");
        }
        experts
    };
    let stream = || cpu.stream().expect("threads");

    let (c, mut s) = (cpu.clone(), stream());
    let (mut out, w, b, mut counts, shape) = routing(&mut s);
    let x = act(rows, HIDDEN);
    all.push((
        "gate",
        Box::new(move || {
            c.gate(&mut s, &x, &w, &b, &shape, rows, &mut out, &mut counts)
                .expect("gate");
        }),
    ));
    let (c, mut s) = (cpu.clone(), stream());
    let (mut out, routing) = dispatched(&mut s);
    let slots = slots();
    all.push((
        "dispatch",
        Box::new(move || {
            c.dispatch(&mut s, &routing, &slots, rows, EXPERTS, &mut out)
                .expect("dispatch");
        }),
    ));
    let (c, mut s) = (cpu.clone(), stream());
    let (dispatch, _) = dispatched(&mut s);
    let (x, w, mut out) = (act(rows, HIDDEN), weights(), act(copies, 2 * INTER));
    all.push((
        "experts gate | up",
        Box::new(move || {
            c.experts_gate_up(
                &mut s,
                Input::Plain(&x),
                &w,
                &dispatch,
                copies,
                TOP_K,
                &mut out,
            )
            .expect("experts");
        }),
    ));
    let (c, mut s) = (cpu.clone(), stream());
    let (x, mut q) = (
        act(copies, 2 * INTER),
        Quantised {
            data: cpu.alloc(DType::Fp8, copies, INTER).expect("memory"),
            scales: cpu.alloc(DType::F32, copies, 1).expect("memory"),
        },
    );
    all.push((
        "experts swiglu + quantise",
        Box::new(move || {
            let to = Output {
                plain: None,
                quantised: Some((&mut q, ScaleFormat::F32)),
            };
            c.swiglu(&mut s, &x, copies, to).expect("swiglu");
        }),
    ));
    let (c, mut s) = (cpu.clone(), stream());
    let (dispatch, _) = dispatched(&mut s);
    let (x, w, mut out) = (act(copies, INTER), weights(), act(copies, HIDDEN));
    all.push((
        "experts down",
        Box::new(move || {
            c.experts_down(&mut s, Input::Plain(&x), &w, &dispatch, copies, &mut out)
                .expect("experts");
        }),
    ));
    let (c, mut s) = (cpu.clone(), stream());
    let (dispatch, routing) = dispatched(&mut s);
    let (y, shared, mut out) = (act(copies, HIDDEN), act(rows, HIDDEN), act(rows, HIDDEN));
    all.push((
        "combine",
        Box::new(move || {
            c.combine(
                &mut s,
                &y,
                &routing,
                &dispatch,
                Some(&shared),
                rows,
                &mut out,
            )
            .expect("combine");
        }),
    ));
}
