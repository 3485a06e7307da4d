//! Products: dense and per head.

use half::bf16;

use super::{
    Checkpoint, Cpu, Random, Stream, backends, check, dequantised, floats, ints, poisoned,
    poisoned_quantised, tensor,
};
use crate::backend::{Backend, Input, Precision, ScaleFormat};
use crate::tensor::DType;

/// Rounding of float32 sums of a few thousand products, relative to the result's root mean square.
pub(super) const SUMS: f64 = 2e-5;

pub(super) const FORMS: [(DType, Precision); 4] = [
    (DType::F32, Precision::F32),
    (DType::Bf16, Precision::Bf16),
    (DType::Fp8, Precision::W8),
    (DType::Fp8, Precision::F32),
];

/// `x W^T` in float64.
pub(super) fn product(x: &[f32], parts: &[&Checkpoint]) -> Vec<f64> {
    let cols = parts[0].cols;
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        for part in parts {
            for n in 0..part.rows {
                out.push((0..cols).map(|k| f64::from(x[k]) * part.value(n, k)).sum());
            }
        }
    }
    out
}

#[test]
fn products_of_all_forms_and_odd_shapes_are_right() {
    let mut random = Random::new(1);
    let shapes = [
        (1, 1, 1),
        (1, 32, 16),
        (1, 100, 129),
        (2, 33, 64),
        (3, 64, 256),
        (4, 31, 200),
        (5, 40, 48),
        (6, 65, 17),
        (7, 130, 300),
        (49, 50, 144),
        (100, 36, 130),
        (0, 5, 5),
    ];
    for (rows, n, k) in shapes {
        for (dtype, precision) in FORMS {
            let x = random.values(rows * k);
            let parts = [n, n / 2 + 1].map(|n| Checkpoint::random(&mut random, dtype, n, k));
            let want = product(&x, &[&parts[0], &parts[1]]);
            check(
                &format!("{rows} {n} {k} {precision:?}"),
                &want,
                SUMS,
                |cpu, stream| {
                    let weight = cpu
                        .linear(&parts.each_ref().map(Checkpoint::host), precision)
                        .unwrap();
                    let mut out = poisoned(cpu, rows, parts[0].rows + parts[1].rows);
                    let x = tensor(cpu, k, &x);
                    cpu.matmul(stream, Input::Plain(&x), &weight, rows, &mut out)
                        .unwrap();
                    floats(&out)
                },
            );
        }
    }
}

#[test]
fn quantised_products_are_those_of_the_quantised_operands() {
    let mut random = Random::new(2);
    for (rows, n, k) in [(1, 128, 256), (3, 70, 300), (8, 200, 128), (50, 40, 100)] {
        for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            let x = random.values(rows * k);
            let weight = Checkpoint::random(&mut random, DType::Fp8, n, k);
            // The operands are the reference's: quantisation has tests of its own.
            let oracle = &backends()[0];
            let mut q = poisoned_quantised(oracle, rows, k);
            let mut stream = oracle.stream().unwrap();
            oracle
                .quantise(&mut stream, &tensor(oracle, k, &x), rows, format, &mut q)
                .unwrap();
            let want = product(&dequantised(&q), &[&weight]);
            check(
                &format!("{rows} {n} {k} {format:?}"),
                &want,
                SUMS,
                |cpu, stream| {
                    let weight = cpu.linear(&[weight.host()], Precision::W8A8).unwrap();
                    let mut q = poisoned_quantised(cpu, rows, k);
                    cpu.quantise(stream, &tensor(cpu, k, &x), rows, format, &mut q)
                        .unwrap();
                    let mut out = poisoned(cpu, rows, n);
                    cpu.matmul(stream, Input::Quantised(&q), &weight, rows, &mut out)
                        .unwrap();
                    floats(&out)
                },
            );
        }
    }
}

#[test]
fn rounded_products_are_those_of_inputs_that_were_rounded_before() {
    let mut random = Random::new(7);
    for (rows, n, k) in [(1, 40, 100), (3, 64, 256), (50, 130, 70), (120, 33, 400)] {
        for (dtype, precision) in FORMS {
            let x = random.values(rows * k);
            let rounded: Vec<f32> = x.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            assert_ne!(x, rounded);
            let weight = Checkpoint::random(&mut random, dtype, n, k);
            let want = product(&rounded, &[&weight]);
            let case = format!("{rows} {n} {k} {precision:?}");
            check(&case, &want, SUMS, |cpu, stream| {
                let linear = cpu.linear(&[weight.host()], precision).unwrap();
                let [x, rounded] = [&x, &rounded].map(|x| tensor(cpu, k, x));
                let [out, same] = [Input::Rounded(&x), Input::Plain(&rounded)].map(|input| {
                    let mut out = poisoned(cpu, rows, n);
                    cpu.matmul(stream, input, &linear, rows, &mut out).unwrap();
                    floats(&out)
                });
                assert_eq!(out, same, "{case}");
                // What other operations read stays as it was.
                assert_ne!(floats(&x), floats(&rounded));
                out
            });
        }
    }
}

#[test]
fn a_row_has_the_same_bits_whatever_rows_are_beside_it() {
    let mut random = Random::new(3);
    let (n, k) = (72, 400);
    for (dtype, precision) in FORMS {
        let weight = Checkpoint::random(&mut random, dtype, n, k);
        let x = random.values(120 * k);
        for cpu in backends() {
            let mut stream = cpu.stream().unwrap();
            let linear = cpu.linear(&[weight.host()], precision).unwrap();
            let mut run = |rows: usize| {
                let mut out = poisoned(&cpu, rows, n);
                let x = tensor(&cpu, k, &x[..rows * k]);
                cpu.matmul(&mut stream, Input::Plain(&x), &linear, rows, &mut out)
                    .unwrap();
                floats(&out)
            };
            let all = run(120);
            for rows in [1, 2, 3, 4, 5, 6, 7, 13, 48, 49, 97] {
                assert_eq!(
                    run(rows),
                    all[..rows * n],
                    "{rows} rows, {precision:?}, {cpu:?}"
                );
            }
        }
    }
}

/// Inputs that are BF16 values, which the processor's tiles may multiply, among them zeros; weights with zeros, the
/// smallest and the largest values; and both with what tiles cannot do.
#[test]
fn inputs_that_are_bf16_values_give_the_same_bits_in_tiles_and_in_vectors() {
    let mut random = Random::new(7);
    for (rows, n, k) in [
        (1, 32, 32),
        (5, 70, 100),
        (16, 33, 128),
        (33, 64, 290),
        (401, 40, 64),
    ] {
        for (dtype, precision) in FORMS {
            for odd in [
                None,
                Some(f32::NAN),
                Some(f32::MIN_POSITIVE),
                Some(1.000_01),
            ] {
                let mut x = random.values(rows * k);
                for v in &mut x {
                    *v = bf16::from_f32(*v).to_f32();
                    if random.below(9) == 0 {
                        *v = 0.0;
                    }
                }
                let mut weight = Checkpoint::random(&mut random, dtype, n, k);
                if dtype == DType::Fp8 {
                    for byte in 0..n.min(k) {
                        // Every value but NaN, the subnormal ones first.
                        weight.data[byte * 7 % (n * k)] = (byte as u8 & 0x7f).min(0x7e);
                    }
                }
                let want = product(&x, &[&weight]);
                if let Some(odd) = odd {
                    // One value in the last row; the others' products are the same.
                    x[rows * k - 3] = odd;
                }
                let last = (rows - 1) * n;
                let run = |cpu: &Cpu, stream: &mut Stream, rows: usize| {
                    let linear = cpu.linear(&[weight.host()], precision).unwrap();
                    let mut out = poisoned(cpu, rows, n);
                    let x = tensor(cpu, k, &x[..rows * k]);
                    cpu.matmul(stream, Input::Plain(&x), &linear, rows, &mut out)
                        .unwrap();
                    floats(&out)
                };
                let what = format!("{rows} {n} {k} {precision:?} {odd:?}");
                check(&what, &want[..last], SUMS, |cpu, stream| {
                    let out = run(cpu, stream, rows);
                    let nan = odd.is_some_and(f32::is_nan);
                    assert!(out[last..].iter().all(|v| v.is_nan() == nan), "{what}");
                    if rows > 1 {
                        assert_eq!(run(cpu, stream, rows - 1), out[..last], "{what} {cpu:?}");
                    }
                    out[..last].to_vec()
                });
                if odd.is_none() {
                    check(&what, &want, SUMS, |cpu, stream| run(cpu, stream, rows));
                }
            }
        }
    }
}

#[test]
fn weights_that_are_no_numbers_show_in_their_outputs_alone() {
    let mut random = Random::new(8);
    let (rows, n, k) = (20, 70, 96);
    for (dtype, precision) in FORMS {
        let mut weight = Checkpoint::random(&mut random, dtype, n, k);
        let at = (33 * k + 5) * dtype.bytes();
        weight.data[at..at + dtype.bytes()].fill(0xff);
        let x: Vec<f32> = (0..rows * k).map(|i| (i % 7) as f32 - 3.5).collect();
        for cpu in backends() {
            let linear = cpu.linear(&[weight.host()], precision).unwrap();
            let mut out = poisoned(&cpu, rows, n);
            let x = tensor(&cpu, k, &x);
            let stream = &mut cpu.stream().unwrap();
            cpu.matmul(stream, Input::Plain(&x), &linear, rows, &mut out)
                .unwrap();
            for (i, v) in floats(&out).iter().enumerate() {
                assert_eq!(v.is_nan(), i % n == 33, "{precision:?} {cpu:?} {i}");
            }
        }
    }
}

#[test]
fn nan_and_infinity_show_in_the_outputs_they_touch_and_only_there() {
    let mut random = Random::new(4);
    let (rows, n, k) = (8, 40, 70);
    let weight = Checkpoint::random(&mut random, DType::Bf16, n, k);
    let mut x = random.values(rows * k);
    x[3 * k + 5] = f32::NAN;
    x[6 * k + 69] = f32::INFINITY;
    for cpu in backends() {
        let mut stream = cpu.stream().unwrap();
        let linear = cpu.linear(&[weight.host()], Precision::Bf16).unwrap();
        let mut out = poisoned(&cpu, rows, n);
        let x = tensor(&cpu, k, &x);
        cpu.matmul(&mut stream, Input::Plain(&x), &linear, rows, &mut out)
            .unwrap();
        for (t, row) in floats(&out).chunks_exact(n).enumerate() {
            match t {
                3 => assert!(row.iter().all(|v| v.is_nan())),
                6 => assert!(row.iter().all(|v| v.is_infinite())),
                _ => assert!(row.iter().all(|v| v.is_finite())),
            }
        }
    }
}

#[test]
fn absorbed_products_are_per_head() {
    let mut random = Random::new(5);
    for (rows, heads, latent, nope, rope, value) in [
        (1, 8, 128, 32, 32, 32),
        (5, 3, 40, 20, 6, 12),
        (2, 1, 16, 16, 2, 33),
        (0, 2, 8, 8, 2, 8),
    ] {
        let q = random.values(rows * heads * (nope + rope));
        let w_uk = random.values(heads * latent * nope);
        let mut want = Vec::new();
        for q in q.chunks_exact(nope + rope).enumerate() {
            let (h, q) = (q.0 % heads, q.1);
            for i in 0..latent {
                let w = &w_uk[(h * latent + i) * nope..][..nope];
                want.push(
                    q.iter()
                        .zip(w)
                        .map(|(q, w)| f64::from(*q) * f64::from(*w))
                        .sum(),
                );
            }
            want.extend(q[nope..].iter().map(|v| f64::from(*v)));
        }
        check("absorb_query", &want, SUMS, |cpu, stream| {
            let w = cpu
                .heads(heads, latent, nope, &w_uk, Precision::F32)
                .unwrap();
            let mut out = poisoned(cpu, rows, heads * (latent + rope));
            let q = tensor(cpu, heads * (nope + rope), &q);
            cpu.absorb_query(stream, &q, &w, rows, &mut out).unwrap();
            floats(&out)
        });

        let x = random.values(rows * heads * latent);
        let w_uv = random.values(heads * value * latent);
        let mut want = Vec::new();
        for (i, x) in x.chunks_exact(latent).enumerate() {
            for v in 0..value {
                let w = &w_uv[(i % heads * value + v) * latent..][..latent];
                want.push(
                    x.iter()
                        .zip(w)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum(),
                );
            }
        }
        check("absorb_value", &want, SUMS, |cpu, stream| {
            let w = cpu
                .heads(heads, value, latent, &w_uv, Precision::F32)
                .unwrap();
            let mut out = poisoned(cpu, rows, heads * value);
            let x = tensor(cpu, heads * latent, &x);
            cpu.absorb_value(stream, &x, &w, rows, &mut out).unwrap();
            floats(&out)
        });
    }
}

#[test]
fn wrong_shapes_and_foreign_weights_are_errors() {
    let mut random = Random::new(7);
    let weight = Checkpoint::random(&mut random, DType::F32, 4, 6);
    for cpu in backends() {
        let mut stream = cpu.stream().unwrap();
        let linear = cpu.linear(&[weight.host()], Precision::F32).unwrap();
        let x = tensor(&cpu, 6, &random.values(12));
        let run = |x: &_, rows, cols, stream: &mut _| {
            cpu.matmul(
                stream,
                Input::Plain(x),
                &linear,
                rows,
                &mut poisoned(&cpu, 2, cols),
            )
        };
        assert!(run(&x, 2, 4, &mut stream).is_ok());
        assert!(run(&x, 3, 4, &mut stream).is_err());
        assert!(run(&x, 2, 5, &mut stream).is_err());
        assert!(run(&tensor(&cpu, 3, &[1.0; 12]), 2, 4, &mut stream).is_err());
        assert!(run(&ints(&cpu, 6, &[1; 12]), 2, 4, &mut stream).is_err());
        let other = super::Cpu {
            threads: 1,
            isa: cpu.isa.is_none().then(super::Isa::best),
            ..cpu.clone()
        };
        assert!(run(&x, 2, 4, &mut other.stream().unwrap()).is_err());
    }
}
