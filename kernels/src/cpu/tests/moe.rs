//! The gate and the weighted sum of the experts' outputs.

use super::{Random, backends, check, floats, ints, poisoned, tensor};
use crate::backend::{Backend, Dispatch, GateShape, Routing};

/// The gate in float64, with its clear choices: experts are `None` where the scores are too close to tell.
fn route(z: &[f64], bias: &[f32], shape: &GateShape) -> Option<(Vec<i32>, Vec<f64>)> {
    let score: Vec<f64> = z.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
    let choice: Vec<f64> = score
        .iter()
        .zip(bias)
        .map(|(s, b)| s + f64::from(*b))
        .collect();
    let best = |mut of: Vec<(f64, usize)>, n: usize| {
        of.sort_by(|a, b| b.0.total_cmp(&a.0));
        let clear = of.windows(2).take(n).all(|w| w[0].0 - w[1].0 > 1e-5);
        clear.then(|| of.iter().take(n).map(|(_, i)| *i).collect::<Vec<_>>())
    };
    let size = shape.experts / shape.groups;
    let groups = choice.chunks_exact(size).enumerate().map(|(g, group)| {
        let mut group = group.to_vec();
        group.sort_by(|a, b| b.total_cmp(a));
        (group.iter().take(2).sum(), g)
    });
    let groups = best(groups.collect(), shape.top_groups)?;
    let kept = (0..shape.experts).filter(|e| groups.contains(&(e / size)));
    let experts = best(kept.map(|e| (choice[e], e)).collect(), shape.top_k)?;
    let sum: f64 = if shape.normalise {
        experts.iter().map(|e| score[*e]).sum()
    } else {
        1.0
    };
    let weights = experts
        .iter()
        .map(|e| score[*e] / sum * f64::from(shape.scale));
    Some((
        experts.iter().map(|e| *e as i32).collect(),
        weights.collect(),
    ))
}

#[test]
fn gates_of_many_shapes_choose_and_weigh_as_float64_does() {
    let mut random = Random::new(20);
    for (experts, groups, top_groups, top_k, hidden, normalise) in [
        (64, 8, 4, 8, 256, true),
        (256, 8, 4, 8, 100, true),
        (8, 4, 2, 3, 33, true),
        (6, 6, 2, 2, 16, false),
        (5, 1, 1, 4, 1, true),
    ] {
        let shape = GateShape {
            experts,
            groups,
            top_groups,
            top_k,
            scale: 2.5,
            normalise,
        };
        let weight: Vec<f32> = random
            .values(experts * hidden)
            .iter()
            .map(|w| w / (hidden as f32).sqrt())
            .collect();
        let bias: Vec<f32> = random
            .values(experts)
            .iter()
            .map(|b| b * 0.3 - 0.5)
            .collect();
        // Rows whose choice is clear in float64.
        let (mut x, mut chosen, mut want) = (Vec::new(), Vec::new(), Vec::new());
        while chosen.len() < 40 * top_k {
            let row = random.values(hidden);
            let z: Vec<f64> = weight
                .chunks_exact(hidden)
                .map(|w| {
                    w.iter()
                        .zip(&row)
                        .map(|(w, x)| f64::from(*w) * f64::from(*x))
                        .sum()
                })
                .collect();
            if let Some((experts, weights)) = route(&z, &bias, &shape) {
                x.extend(row);
                chosen.extend(experts);
                want.extend(weights);
            }
        }
        let rows = 40;
        check(&format!("{shape:?}"), &want, 5e-6, |cpu, stream| {
            let mut out = Routing {
                experts: ints(cpu, top_k, &vec![-1; rows * top_k]),
                weights: poisoned(cpu, rows, top_k),
            };
            let mut counts = ints(cpu, 1, &vec![100; experts]);
            let (x, weight) = (tensor(cpu, hidden, &x), tensor(cpu, hidden, &weight));
            let bias = tensor(cpu, experts, &bias);
            cpu.gate(
                stream,
                &x,
                &weight,
                &bias,
                &shape,
                rows,
                &mut out,
                &mut counts,
            )
            .unwrap();
            assert_eq!(out.experts.mem.slice::<i32>(), chosen, "{cpu:?}");
            let counts: &[i32] = counts.mem.slice();
            for (e, count) in counts.iter().enumerate() {
                let choices = chosen.iter().filter(|c| **c == e as i32).count();
                assert_eq!(*count, 100 + choices as i32);
            }
            floats(&out.weights)
        });
    }
}

#[test]
fn impossible_gates_are_refused() {
    let good = GateShape {
        experts: 8,
        groups: 4,
        top_groups: 2,
        top_k: 3,
        scale: 1.0,
        normalise: true,
    };
    for (shape, ok) in [
        (good, true),
        (GateShape { groups: 3, ..good }, false),
        (GateShape { groups: 0, ..good }, false),
        (
            GateShape {
                top_groups: 5,
                ..good
            },
            false,
        ),
        (
            GateShape {
                top_groups: 1,
                ..good
            },
            false,
        ),
        (
            GateShape {
                experts: 16,
                ..good
            },
            false,
        ),
    ] {
        for cpu in backends() {
            let mut out = Routing {
                experts: ints(&cpu, 3, &[0; 3]),
                weights: poisoned(&cpu, 1, 3),
            };
            let (x, weight) = (tensor(&cpu, 2, &[1.0; 2]), tensor(&cpu, 2, &[1.0; 16]));
            let (bias, mut counts) = (tensor(&cpu, 8, &[0.0; 8]), ints(&cpu, 1, &[0; 8]));
            let stream = &mut cpu.stream().unwrap();
            let done = cpu.gate(stream, &x, &weight, &bias, &shape, 1, &mut out, &mut counts);
            assert_eq!(done.is_ok(), ok, "{shape:?}");
        }
    }
}

#[test]
fn combine_adds_in_the_gates_order_wherever_the_rows_are() {
    let mut random = Random::new(21);
    for (tokens, top_k, cols) in [(1, 8, 256), (5, 3, 30), (70, 2, 17), (0, 2, 4)] {
        let copies = tokens * top_k;
        let mut row_of_copy: Vec<i32> = (0..copies as i32).collect();
        for i in (1..copies).rev() {
            row_of_copy.swap(i, random.below(i + 1));
        }
        let y = random.values(copies * cols);
        let weights = random.values(copies);
        let shared = random.values(tokens * cols);
        for with_shared in [true, false] {
            let mut want = Vec::new();
            for t in 0..tokens {
                for i in 0..cols {
                    let routed: f64 = (t * top_k..(t + 1) * top_k)
                        .map(|c| {
                            let y = y[row_of_copy[c] as usize * cols + i];
                            f64::from(weights[c]) * f64::from(y)
                        })
                        .sum();
                    let shared = if with_shared {
                        f64::from(shared[t * cols + i])
                    } else {
                        0.0
                    };
                    want.push(routed + shared);
                }
            }
            check("combine", &want, 2e-6, |cpu, stream| {
                let routing = Routing {
                    experts: ints(cpu, top_k, &vec![0; copies]),
                    weights: tensor(cpu, top_k, &weights),
                };
                let dispatch = Dispatch {
                    offsets: ints(cpu, 1, &[0]),
                    copy_of_row: ints(cpu, 1, &row_of_copy),
                    row_of_copy: ints(cpu, 1, &row_of_copy),
                };
                let shared = with_shared.then(|| tensor(cpu, cols, &shared));
                let mut out = poisoned(cpu, tokens, cols);
                let y = tensor(cpu, cols, &y);
                cpu.combine(
                    stream,
                    &y,
                    &routing,
                    &dispatch,
                    shared.as_ref(),
                    tokens,
                    &mut out,
                )
                .unwrap();
                floats(&out)
            });
        }
    }
}

#[test]
fn dispatch_through_the_backend_gives_every_copy_a_row() {
    for cpu in backends() {
        let routing = Routing {
            experts: ints(&cpu, 2, &[1, 0, 1, 2, 0, 1]),
            weights: poisoned(&cpu, 3, 2),
        };
        // Expert 1 has two slots: token 0 and 2 take the first, token 1 the second.
        let slots = ints(&cpu, 3, &[1, 0, 0, 2, 1, 3, 1, 2, 0]);
        let mut out = Dispatch {
            offsets: ints(&cpu, 1, &[-1; 5]),
            copy_of_row: ints(&cpu, 1, &[-1; 6]),
            row_of_copy: ints(&cpu, 1, &[-1; 6]),
        };
        cpu.dispatch(&mut cpu.stream().unwrap(), &routing, &slots, 3, 4, &mut out)
            .unwrap();
        assert_eq!(out.offsets.mem.slice::<i32>(), [0, 2, 4, 5, 6]);
        assert_eq!(out.copy_of_row.mem.slice::<i32>(), [1, 4, 0, 5, 3, 2]);
        assert_eq!(out.row_of_copy.mem.slice::<i32>(), [2, 0, 5, 4, 1, 3]);
    }
}
