//! Norms, quantisation, activation, rotation, copies, argmax.

use super::{
    Random, backends, check, dequantised, floats, ints, poisoned, poisoned_quantised, tensor,
};
use crate::backend::{Backend, Columns, Output, ScaleFormat};
use crate::fp8;

/// Rounding of a row's float32 statistics, relative to the result's root mean square.
const ROW: f64 = 1e-5;

const SHAPES: [(usize, usize); 7] = [
    (1, 1),
    (1, 256),
    (3, 100),
    (2, 129),
    (9, 16),
    (80, 260),
    (0, 8),
];

fn norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter()
        .zip(weight)
        .map(|(x, w)| f64::from(*x) * scale * f64::from(*w))
        .collect()
}

#[test]
fn norms_add_first_and_read_their_columns_only() {
    let mut random = Random::new(10);
    for (rows, cols) in SHAPES {
        let weight = random.values(cols);
        let residual = random.values(rows * cols);
        let delta = random.values(rows * cols);
        let sum: Vec<f32> = residual.iter().zip(&delta).map(|(r, d)| r + d).collect();
        for (x, delta) in [(&residual, None), (&sum, Some(&delta))] {
            let want = x.chunks_exact(cols).flat_map(|x| norm(x, &weight, 1e-6));
            let want: Vec<f64> = want.collect();
            check(
                &format!("add_norm {rows} {cols}"),
                &want,
                ROW,
                |cpu, stream| {
                    let mut r = tensor(cpu, cols, &residual);
                    let delta = delta.map(|d| tensor(cpu, cols, d));
                    let w = tensor(cpu, cols, &weight);
                    let mut out = poisoned(cpu, rows, cols);
                    let to = Output {
                        plain: Some(&mut out),
                        quantised: None,
                    };
                    cpu.add_norm(stream, &mut r, delta.as_ref(), &w, 1e-6, rows, to)
                        .unwrap();
                    assert_eq!(floats(&r), **x);
                    floats(&out)
                },
            );
        }
        let wide: Vec<f32> = residual
            .chunks_exact(cols)
            .flat_map(|row| [&[f32::NAN; 3][..], row, &[f32::NAN; 2]].concat())
            .collect();
        let want = residual
            .chunks_exact(cols)
            .flat_map(|x| norm(x, &weight, 1e-5));
        check("norm", &want.collect::<Vec<f64>>(), ROW, |cpu, stream| {
            let wide = tensor(cpu, cols + 5, &wide);
            let columns = Columns {
                tensor: &wide,
                first: 3,
                cols,
            };
            let w = tensor(cpu, cols, &weight);
            let mut out = poisoned(cpu, rows, cols);
            let to = Output {
                plain: Some(&mut out),
                quantised: None,
            };
            cpu.norm(stream, columns, &w, 1e-5, rows, to).unwrap();
            floats(&out)
        });
    }
}

#[test]
fn swiglu_is_right_also_for_large_gates() {
    let mut random = Random::new(11);
    for (rows, inter) in SHAPES {
        let mut gate_up = random.values(rows * 2 * inter);
        for (i, v) in gate_up.iter_mut().enumerate() {
            *v *= [1.0, 8.0, 40.0, 0.01][i % 4];
        }
        let mut want = Vec::new();
        for row in gate_up.chunks_exact(2 * inter) {
            want.extend((0..inter).map(|i| {
                let (gate, up) = (f64::from(row[i]), f64::from(row[inter + i]));
                gate / (1.0 + (-gate).exp()) * up
            }));
        }
        check("swiglu", &want, ROW, |cpu, stream| {
            let mut out = poisoned(cpu, rows, inter);
            let to = Output {
                plain: Some(&mut out),
                quantised: None,
            };
            cpu.swiglu(stream, &tensor(cpu, 2 * inter, &gate_up), rows, to)
                .unwrap();
            floats(&out)
        });
    }
}

#[test]
fn quantised_outputs_are_the_plain_ones_quantised() {
    let mut random = Random::new(12);
    for (rows, cols) in SHAPES {
        for format in [ScaleFormat::F32, ScaleFormat::Ue8m0] {
            let x = random.values(rows * cols);
            let weight = vec![1.0; cols];
            for cpu in backends() {
                let mut stream = cpu.stream().unwrap();
                let mut plain = poisoned(&cpu, rows, cols);
                let mut both = poisoned_quantised(&cpu, rows, cols);
                let mut alone = poisoned_quantised(&cpu, rows, cols);
                let mut after = poisoned_quantised(&cpu, rows, cols);
                let w = tensor(&cpu, cols, &weight);
                let mut r = tensor(&cpu, cols, &x);
                let to = Output {
                    plain: Some(&mut plain),
                    quantised: Some((&mut both, format)),
                };
                cpu.add_norm(&mut stream, &mut r, None, &w, 1e-6, rows, to)
                    .unwrap();
                let to = Output {
                    plain: None,
                    quantised: Some((&mut alone, format)),
                };
                cpu.add_norm(&mut stream, &mut r, None, &w, 1e-6, rows, to)
                    .unwrap();
                cpu.quantise(&mut stream, &plain, rows, format, &mut after)
                    .unwrap();
                for q in [&both, &alone] {
                    assert_eq!(q.data.mem.slice::<u8>(), after.data.mem.slice::<u8>());
                    assert_eq!(floats(&q.scales), floats(&after.scales));
                }
                // Half a step of the largest binade bounds the error; scales are as the report says.
                let blocks = cols.div_ceil(fp8::BLOCK);
                let plain = floats(&plain);
                for (i, (got, want)) in dequantised(&after).iter().zip(&plain).enumerate() {
                    let block = i % cols / fp8::BLOCK;
                    let row = &plain[i / cols * cols..][..cols];
                    let end = cols.min((block + 1) * fp8::BLOCK);
                    let amax = row[block * fp8::BLOCK..end]
                        .iter()
                        .fold(0.0, |a: f32, v| a.max(v.abs()));
                    let scale = match format {
                        ScaleFormat::F32 => fp8::scale(amax),
                        ScaleFormat::Ue8m0 => fp8::scale_ue8m0(amax),
                    };
                    assert_eq!(floats(&after.scales)[i / cols * blocks + block], scale);
                    let bound = (want.abs() / 16.0).max(scale / 512.0 / 2.0) * 1.0001;
                    assert!((got - want).abs() <= bound, "{got} {want} {bound}");
                }
            }
        }
    }
}

#[test]
fn rows_of_zeros_and_of_nan_quantise_visibly() {
    for cpu in backends() {
        let mut stream = cpu.stream().unwrap();
        let mut x = vec![0.0; 3 * 130];
        x[130] = f32::NAN;
        x[260 + 129] = f32::INFINITY;
        let mut q = poisoned_quantised(&cpu, 3, 130);
        let x = tensor(&cpu, 130, &x);
        cpu.quantise(&mut stream, &x, 3, ScaleFormat::F32, &mut q)
            .unwrap();
        let got = dequantised(&q);
        assert!(got[..130].iter().all(|v| *v == 0.0));
        assert!(got[130].is_nan() && got[131] == 0.0);
        assert!(got[260 + 129].is_nan() && got[260] == 0.0);
    }
}

#[test]
fn rope_turns_neighbours_by_their_angle_and_leaves_the_rest() {
    let mut random = Random::new(13);
    let (rows, heads, nope, rope) = (20, 3, 5, 6);
    let q = random.values(rows * heads * (nope + rope));
    let positions: Vec<i32> = (0..rows as i32).map(|t| t * 7 % 11).collect();
    let angle = |p: i32, i: usize| f64::from(p) * 0.3 / (1.0 + i as f64);
    let table: Vec<f32> = (0..11)
        .flat_map(|p| (0..rope).map(move |i| (p, i)))
        .map(|(p, i)| {
            let angle = angle(p, i / 2);
            (if i % 2 == 0 { angle.cos() } else { angle.sin() }) as f32
        })
        .collect();
    let mut want = Vec::new();
    for (i, head) in q.chunks_exact(nope + rope).enumerate() {
        want.extend(head[..nope].iter().map(|v| f64::from(*v)));
        for (pair, v) in head[nope..].chunks_exact(2).enumerate() {
            let (re, im) = (f64::from(v[0]), f64::from(v[1]));
            let (sin, cos) = angle(positions[i / heads], pair).sin_cos();
            want.extend([re * cos - im * sin, re * sin + im * cos]);
        }
    }
    check("rope", &want, ROW, |cpu, stream| {
        let mut q = tensor(cpu, heads * (nope + rope), &q);
        let (table, positions) = (tensor(cpu, rope, &table), ints(cpu, 1, &positions));
        cpu.rope(stream, &mut q, heads, nope, rope, &table, &positions, rows)
            .unwrap();
        floats(&q)
    });
}

#[test]
fn copies_go_where_the_index_says_and_bad_indices_are_errors() {
    for cpu in backends() {
        let mut stream = cpu.stream().unwrap();
        let x = tensor(&cpu, 2, &[0.0, 1.0, 10.0, 11.0, 20.0, 21.0]);
        let mut out = poisoned(&cpu, 3, 2);
        let index = ints(&cpu, 1, &[2, 0]);
        cpu.gather(&mut stream, &x, &index, 2, &mut out).unwrap();
        assert_eq!(floats(&out)[..4], [20.0, 21.0, 0.0, 1.0]);
        assert!(floats(&out)[4].is_nan());
        cpu.embed(&mut stream, &x, &index, 2, &mut out).unwrap();
        assert_eq!(floats(&out)[..4], [20.0, 21.0, 0.0, 1.0]);
        let mut out = poisoned(&cpu, 3, 2);
        cpu.scatter(&mut stream, &x, &index, 2, &mut out).unwrap();
        assert_eq!(floats(&out)[4..], [0.0, 1.0]);
        assert_eq!(floats(&out)[..2], [10.0, 11.0]);
        let mut wide = poisoned(&cpu, 3, 4);
        cpu.concat(&mut stream, &x, &x, 3, &mut wide).unwrap();
        assert_eq!(floats(&wide)[4..8], [10.0, 11.0, 10.0, 11.0]);
        for bad in [3, -1] {
            let bad = ints(&cpu, 1, &[bad]);
            assert!(cpu.gather(&mut stream, &x, &bad, 1, &mut out).is_err());
            assert!(cpu.scatter(&mut stream, &x, &bad, 1, &mut out).is_err());
        }
    }
}

#[test]
fn argmax_takes_the_first_of_equals_and_shows_nan() {
    let logits = [
        [1.0, 3.0, 3.0, 2.0],
        [f32::NEG_INFINITY; 4],
        [0.0, 1.0, f32::NAN, 9.0],
        [f32::NAN, 1.0, 2.0, 3.0],
        [-1.0, f32::INFINITY, 0.0, f32::INFINITY],
    ];
    for cpu in backends() {
        let mut out = ints(&cpu, 1, &[-9; 5]);
        let logits = tensor(&cpu, 4, logits.as_flattened());
        cpu.argmax(&mut cpu.stream().unwrap(), &logits, 5, &mut out)
            .unwrap();
        assert_eq!(out.mem.slice::<i32>(), [1, 0, -1, -1, 1]);
    }
}
