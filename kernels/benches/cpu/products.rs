//! Products of one matrix.

use std::hint::black_box;

use kernels::backend::Input;
use kernels::cpu::Cpu;
use kernels::{Backend, DType, Precision};

use crate::host::{Host, quantised, tensor, values};
use crate::timing::race;

/// Times the product of `rows` rows with an `[n, k]` matrix.
pub(crate) fn product(
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
        "{name:40} {rows:>5} {:>10.1} {:>9.1} {:>8.1} {:>11} {:>8}",
        times[0],
        2.0 * macs / times[0] / 1e3,
        host.data.len() as f64 / times[0] / 1e3,
        ratio(1),
        ratio(2)
    );
}

/// The product on one backend, of inputs that are quantised where the precision says so.
fn matmul(cpu: &Cpu, host: &Host, precision: Precision, rows: usize, x: &[f32]) -> impl FnMut() {
    let weight = cpu.linear(&[host.matrix()], precision).expect("weights");
    let plain = tensor(cpu, host.cols, x);
    let quantised = (precision == Precision::W8A8).then(|| quantised(cpu, host.cols, x));
    let mut out = cpu.alloc(DType::F32, rows, host.rows).expect("memory");
    let mut stream = cpu.stream().expect("threads");
    let cpu = Cpu::clone(cpu);
    move || {
        let x = match &quantised {
            Some(quantised) => Input::Quantised(quantised),
            None => Input::Plain(&plain),
        };
        cpu.matmul(&mut stream, x, &weight, rows, &mut out)
            .expect("product");
    }
}
