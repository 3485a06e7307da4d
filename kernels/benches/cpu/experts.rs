//! Gate, dispatch and experts of the layer.

use kernels::backend::{Dispatch, GateShape, Input, Output, Quantised, Routing, ScaleFormat};
use kernels::cpu::Cpu;
use kernels::{Backend, DType, Precision};

use crate::host::{Host, ints, quantised, tensor, values};
use crate::layer::{EXPERTS, HIDDEN, INTER, Step, TOP_K};

/// Adds the operations from the gate to `combine`.
pub(crate) fn experts(cpu: &Cpu, rows: usize, all: &mut Vec<Step>) {
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
    let x = quantised(cpu, HIDDEN, &values(rows * HIDDEN));
    let (w, mut out) = (weights(), act(copies, 2 * INTER));
    all.push((
        "experts gate | up",
        Box::new(move || {
            c.experts_gate_up(
                &mut s,
                Input::Quantised(&x),
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
    let x = quantised(cpu, INTER, &values(copies * INTER));
    let (w, mut out) = (weights(), act(copies, HIDDEN));
    all.push((
        "experts down",
        Box::new(move || {
            c.experts_down(
                &mut s,
                Input::Quantised(&x),
                &w,
                &dispatch,
                copies,
                &mut out,
            )
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
