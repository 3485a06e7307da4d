//! MLA prefill.

use cudarc::driver::CudaSlice;
use kernels::cases::attention::{Attended, Expanded, SCALE, starts};
use kernels::cases::floats;
use kernels::cuda::prefill::{self, Inputs, KEY_VALUE, QUERY, ROPE, Shape, VALUE};
use kernels::cuda::probe::Kind;

use super::{Case, Ran};
use crate::harness::{Harness, Result};

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let case = |(name, heads, list): (_, usize, Vec<(usize, usize)>)| {
        Case::shared(
            format!("mla_prefill heads {heads} {name}"),
            move || Expanded::new(heads, list.clone()),
            attend,
        )
    };
    let broken = Case::shared("mla_prefill broken tokens".into(), Expanded::broken, attend);
    let lists = Expanded::lists().into_iter().map(case);
    lists.chain([broken]).collect()
}

fn totals(list: &[(usize, usize)]) -> (usize, usize) {
    (
        list.iter().map(|l| l.0).sum(),
        list.iter().map(|l| l.1).sum(),
    )
}

/// Buffers of a prefill step.
pub(crate) struct Step {
    shape: Shape,
    q: CudaSlice<u16>,
    kv: CudaSlice<u16>,
    rope: CudaSlice<u16>,
    query_start: CudaSlice<i32>,
    context_start: CudaSlice<i32>,
    out: CudaSlice<u16>,
    lse: CudaSlice<f32>,
}

impl Step {
    fn new(
        h: &Harness,
        heads: usize,
        list: &[(usize, usize)],
        (q, kv, rope): (CudaSlice<u16>, CudaSlice<u16>, CudaSlice<u16>),
    ) -> Result<Self> {
        let (rows, context) = totals(list);
        let shape = Shape {
            sequences: list.len(),
            rows,
            context,
            max_query: list.iter().map(|l| l.0).max().unwrap_or(0),
            heads,
        };
        Ok(Self {
            shape,
            q,
            kv,
            rope,
            query_start: h.upload(&starts(list.iter().map(|l| l.0)))?,
            context_start: h.upload(&starts(list.iter().map(|l| l.1)))?,
            out: h.poisoned(rows * heads * VALUE)?,
            lse: h.poisoned(rows * heads)?,
        })
    }

    /// Random inputs for sequences of (queries, context), made on the device.
    pub(crate) fn random(h: &Harness, heads: usize, list: &[(usize, usize)]) -> Result<Self> {
        let (rows, context) = totals(list);
        let inputs = (
            h.random(rows * heads * QUERY, Kind::Bf16Normal, 1.0, 1)?,
            h.random(context * heads * KEY_VALUE, Kind::Bf16Normal, 0.6, 2)?,
            h.random(context * ROPE, Kind::Bf16Normal, 0.6, 3)?,
        );
        Self::new(h, heads, list, inputs)
    }

    /// Attends.
    pub(crate) fn attend(&self, h: &Harness, overlap: bool) -> Result<()> {
        let inputs = Inputs {
            q: h.span(&self.q),
            kv: h.span(&self.kv),
            rope: h.span(&self.rope),
            query_start: h.span(&self.query_start),
            context_start: h.span(&self.context_start),
        };
        let (out, lse) = (h.span(&self.out), h.span(&self.lse));
        Ok(prefill::attend(
            &h.gpu,
            &h.stream,
            self.shape,
            inputs,
            SCALE,
            out,
            Some(lse),
            overlap,
        )?)
    }
}

fn attend(h: &Harness, case: &Expanded) -> Result<Ran<Attended>> {
    let inputs = (
        h.upload(&case.q)?,
        h.upload(&case.kv)?,
        h.upload(&case.rope)?,
    );
    let step = Step::new(h, case.heads, &case.list, inputs)?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&step.out)?;
        step.attend(h, false)?;
        *digest = h.digest(&step.out)?;
    }
    let out = h.download(&step.out)?;
    Ok(Ran {
        wrong: out.iter().filter(|&&v| v == 0xffff).count(),
        out: Attended {
            out: floats(&out),
            lse: Some(h.download(&step.lse)?),
        },
        repeats: digests[0] == digests[1],
    })
}
