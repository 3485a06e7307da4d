//! Products by expert.

use super::linear::{FORMS, SUMS, product};
use super::{
    Checkpoint, Cpu, Random, Stream, backends, check, dequantised, floats, ints, poisoned,
    poisoned_quantised, tensor,
};
use crate::backend::{Backend, Dispatch, Input, Precision, ScaleFormat};
use crate::cpu::{Experts, Memory};
use crate::tensor::DType;

/// Puts an expert's gate, up and down weights into a slot.
fn load(cpu: &Cpu, weights: &mut Experts, slot: usize, expert: &[Checkpoint; 3]) {
    let [gate, up, down] = expert.each_ref().map(Checkpoint::host);
    cpu.load_expert(weights, slot, &gate, &up, &down).unwrap();
}

/// Rows by slot; where a copy went is of no use to products.
fn dispatched(cpu: &Cpu, offsets: &[i32], copy_of_row: &[i32]) -> Dispatch<Memory> {
    Dispatch {
        offsets: ints(cpu, 1, offsets),
        copy_of_row: ints(cpu, 1, copy_of_row),
        row_of_copy: ints(cpu, 1, copy_of_row),
    }
}

#[test]
fn experts_multiply_the_rows_that_dispatch_gave_them() {
    let mut random = Random::new(6);
    let (hidden, inter, top_k, slots) = (144, 40, 2, 5);
    for (dtype, precision) in FORMS {
        for tokens in [1, 4, 60] {
            // Slot 1 is empty, slot 4 gets a single row.
            let copies = tokens * top_k;
            let slot_of = |row: usize| {
                [0, 2, 3][row * 3 / copies.max(2)].max(usize::from(row + 1 == copies) * 4)
            };
            let mut offsets = vec![0; slots + 1];
            (0..copies).for_each(|row| offsets[slot_of(row) + 1] += 1);
            (0..slots).for_each(|s| offsets[s + 1] += offsets[s]);
            let copy_of_row: Vec<i32> = (0..copies).rev().map(|c| c as i32).collect();
            let experts: Vec<[Checkpoint; 3]> = (0..slots)
                .map(|_| {
                    [(inter, hidden), (inter, hidden), (hidden, inter)]
                        .map(|(rows, cols)| Checkpoint::random(&mut random, dtype, rows, cols))
                })
                .collect();
            let x = random.values(tokens * hidden);
            let y = random.values(copies * inter);
            let (mut up, mut down) = (Vec::new(), Vec::new());
            for row in 0..copies {
                let [gate, proj, back] = &experts[slot_of(row)];
                let token = copy_of_row[row] as usize / top_k;
                up.extend(product(&x[token * hidden..][..hidden], &[gate, proj]));
                down.extend(product(&y[row * inter..][..inter], &[back]));
            }
            for (what, want) in [("gate_up", up), ("down", down)] {
                check(
                    &format!("{what} {tokens} {precision:?}"),
                    &want,
                    SUMS,
                    |cpu, stream| {
                        let mut weights = cpu.experts(slots, hidden, inter, precision).unwrap();
                        for (slot, expert) in experts.iter().enumerate().filter(|(s, _)| *s != 1) {
                            load(cpu, &mut weights, slot, expert);
                        }
                        let dispatch = dispatched(cpu, &offsets, &copy_of_row);
                        let width = if what == "down" { hidden } else { 2 * inter };
                        let mut out = poisoned(cpu, copies, width);
                        let done = if what == "down" {
                            let y = tensor(cpu, inter, &y);
                            cpu.experts_down(
                                stream,
                                Input::Plain(&y),
                                &weights,
                                &dispatch,
                                copies,
                                &mut out,
                            )
                        } else {
                            let x = tensor(cpu, hidden, &x);
                            cpu.experts_gate_up(
                                stream,
                                Input::Plain(&x),
                                &weights,
                                &dispatch,
                                copies,
                                top_k,
                                &mut out,
                            )
                        };
                        done.unwrap();
                        floats(&out)
                    },
                );
            }
        }
    }
}

/// Slots of few and of many rows in one product, which computes them in different ways; tokens that several slots read.
#[test]
fn quantised_experts_are_right_however_many_rows_each_has() {
    let mut random = Random::new(9);
    let (hidden, inter, top_k) = (200, 48, 2);
    let rows_of_slot = [1, 40, 2, 0, 3, 2, 18];
    let copies: usize = rows_of_slot.iter().sum();
    let mut offsets = vec![0];
    offsets.extend(rows_of_slot.iter().scan(0, |end, rows| {
        *end += *rows as i32;
        Some(*end)
    }));
    let copy_of_row: Vec<i32> = (0..copies).map(|row| (row * 7 % copies) as i32).collect();
    let experts: Vec<[Checkpoint; 3]> = (0..rows_of_slot.len())
        .map(|_| {
            [(inter, hidden), (inter, hidden), (hidden, inter)]
                .map(|(rows, cols)| Checkpoint::random(&mut random, DType::Fp8, rows, cols))
        })
        .collect();
    let x = random.values(copies / top_k * hidden);
    let quantised = |cpu: &Cpu, stream: &mut Stream| {
        let mut q = poisoned_quantised(cpu, copies / top_k, hidden);
        let x = tensor(cpu, hidden, &x);
        cpu.quantise(stream, &x, copies / top_k, ScaleFormat::F32, &mut q)
            .unwrap();
        q
    };
    let oracle = &backends()[0];
    let exact = dequantised(&quantised(oracle, &mut oracle.stream().unwrap()));
    let mut want = Vec::new();
    for (slot, [gate, up, _]) in experts.iter().enumerate() {
        for row in offsets[slot]..offsets[slot + 1] {
            let token = copy_of_row[row as usize] as usize / top_k;
            want.extend(product(&exact[token * hidden..][..hidden], &[gate, up]));
        }
    }
    check("experts_gate_up", &want, SUMS, |cpu, stream| {
        let mut weights = (cpu.experts(experts.len(), hidden, inter, Precision::W8A8)).unwrap();
        for (slot, expert) in experts.iter().enumerate() {
            load(cpu, &mut weights, slot, expert);
        }
        let dispatch = dispatched(cpu, &offsets, &copy_of_row);
        let q = quantised(cpu, stream);
        let (x, mut out) = (Input::Quantised(&q), poisoned(cpu, copies, 2 * inter));
        cpu.experts_gate_up(stream, x, &weights, &dispatch, copies, top_k, &mut out)
            .unwrap();
        floats(&out)
    });
}
