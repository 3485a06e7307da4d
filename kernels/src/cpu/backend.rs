//! `Backend` for the CPU: memory and weights here, operations in `ops`.

use super::cache::Cache;
use super::memory::Memory;
use super::multiply::Weights;
use super::pool::Pool;
use super::views::{ensure, shape};
use super::{Cpu, Expert, Experts, Heads, Linear, Stream, ops};
use crate::backend::{
    Backend, Columns, Dispatch, Error, GateShape, HostMatrix, Input, Output, Precision, Quantised,
    Result, Routing, ScaleFormat, Sequences,
};
use crate::tensor::{DType, Tensor};

impl Backend for Cpu {
    type Mem = Memory;
    type Stream = Stream;
    type Linear = Linear;
    type Experts = Experts;
    type Heads = Heads;
    type Cache = Cache;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn activation(&self, _precision: Precision) -> DType {
        DType::F32
    }

    fn stream(&self) -> Result<Stream> {
        let pool = Pool::new(self.threads).map_err(|e| Error::Device {
            op: "stream",
            detail: e.to_string(),
        })?;
        Ok(Stream {
            pool,
            isa: self.isa,
            inputs: Vec::new(),
            rounded: Vec::new(),
        })
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor<Memory>> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.bytes()))
            .ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Tensor {
            mem: Memory::zeroed(bytes)?,
            dtype,
            rows,
            cols,
        })
    }

    fn import(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        data: &[u8],
    ) -> Result<Tensor<Memory>> {
        ensure(data.len() == rows * cols * dtype.bytes(), "import", || {
            format!("{} bytes for [{rows}, {cols}] of {dtype:?}", data.len())
        })?;
        Ok(Tensor {
            mem: Memory::copied(data)?,
            dtype,
            rows,
            cols,
        })
    }

    fn linear(&self, parts: &[HostMatrix<'_>], precision: Precision) -> Result<Linear> {
        Ok(Linear(Weights::new("linear", parts, precision, self)?))
    }

    fn experts(
        &self,
        slots: usize,
        hidden: usize,
        inter: usize,
        precision: Precision,
    ) -> Result<Experts> {
        Ok(Experts {
            hidden,
            inter,
            precision,
            slots: (0..slots).map(|_| None).collect(),
        })
    }

    fn load_expert(
        &self,
        experts: &mut Experts,
        slot: usize,
        gate: &HostMatrix<'_>,
        up: &HostMatrix<'_>,
        down: &HostMatrix<'_>,
    ) -> Result<()> {
        let op = "load_expert";
        let (hidden, inter) = (experts.hidden, experts.inter);
        for (name, m, rows, cols) in [
            ("gate", gate, inter, hidden),
            ("up", up, inter, hidden),
            ("down", down, hidden, inter),
        ] {
            ensure(m.rows == rows && m.cols == cols, op, || {
                format!("{name} is [{}, {}], not [{rows}, {cols}]", m.rows, m.cols)
            })?;
        }
        let expert = Expert {
            gate_up: Weights::new(op, &[gate.clone(), up.clone()], experts.precision, self)?,
            down: Weights::new(op, std::slice::from_ref(down), experts.precision, self)?,
        };
        let count = experts.slots.len();
        let Some(place) = experts.slots.get_mut(slot) else {
            return shape(op, format!("slot {slot} of {count}"));
        };
        *place = Some(expert);
        Ok(())
    }

    fn heads(
        &self,
        heads: usize,
        out: usize,
        inp: usize,
        data: &[f32],
        precision: Precision,
    ) -> Result<Heads> {
        ensure(
            data.len() == heads * out * inp && !data.is_empty(),
            "heads",
            || format!("{} values for [{heads}, {out}, {inp}]", data.len()),
        )?;
        let heads = data.chunks_exact(out * inp).map(|head| {
            let part = HostMatrix {
                dtype: DType::F32,
                rows: out,
                cols: inp,
                data: bytemuck::cast_slice(head),
                scales: None,
            };
            Weights::new("heads", &[part], precision, self)
        });
        Ok(Heads {
            out,
            inp,
            matrices: heads.collect::<Result<_>>()?,
        })
    }

    fn cache(&self, blocks: usize, layers: usize, width: usize, dtype: DType) -> Result<Cache> {
        Cache::new(blocks, layers, width, dtype)
    }

    fn upload(&self, _: &mut Stream, data: &[u8], to: &mut Tensor<Memory>) -> Result<()> {
        let Some(to) = to.mem.slice_mut().get_mut(..data.len()) else {
            return shape("upload", format!("{} bytes do not fit", data.len()));
        };
        to.copy_from_slice(data);
        Ok(())
    }

    fn download(&self, _: &mut Stream, from: &Tensor<Memory>, data: &mut [u8]) -> Result<()> {
        let Some(from) = from.mem.slice().get(..data.len()) else {
            return shape("download", format!("{} bytes asked for", data.len()));
        };
        data.copy_from_slice(from);
        Ok(())
    }

    fn synchronize(&self, _: &mut Stream) -> Result<()> {
        Ok(())
    }

    fn embed(
        &self,
        _: &mut Stream,
        table: &Tensor<Memory>,
        tokens: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::gather(table, tokens, rows, out)
    }

    fn add_norm(
        &self,
        stream: &mut Stream,
        residual: &mut Tensor<Memory>,
        delta: Option<&Tensor<Memory>>,
        weight: &Tensor<Memory>,
        eps: f32,
        rows: usize,
        out: Output<'_, Memory>,
    ) -> Result<()> {
        ops::add_norm(stream, residual, delta, weight, eps, rows, out)
    }

    fn norm(
        &self,
        stream: &mut Stream,
        x: Columns<'_, Memory>,
        weight: &Tensor<Memory>,
        eps: f32,
        rows: usize,
        out: Output<'_, Memory>,
    ) -> Result<()> {
        ops::norm(stream, &x, weight, eps, rows, out)
    }

    fn quantise(
        &self,
        stream: &mut Stream,
        x: &Tensor<Memory>,
        rows: usize,
        scale: ScaleFormat,
        out: &mut Quantised<Memory>,
    ) -> Result<()> {
        ops::quantise(stream, x, rows, scale, out)
    }

    fn matmul(
        &self,
        stream: &mut Stream,
        x: Input<'_, Memory>,
        weight: &Linear,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::matmul(stream, &x, weight, rows, out)
    }

    fn swiglu(
        &self,
        stream: &mut Stream,
        gate_up: &Tensor<Memory>,
        rows: usize,
        out: Output<'_, Memory>,
    ) -> Result<()> {
        ops::swiglu(stream, gate_up, rows, out)
    }

    fn gather(
        &self,
        _: &mut Stream,
        x: &Tensor<Memory>,
        index: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::gather(x, index, rows, out)
    }

    fn scatter(
        &self,
        _: &mut Stream,
        x: &Tensor<Memory>,
        index: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::scatter(x, index, rows, out)
    }

    fn concat(
        &self,
        _: &mut Stream,
        a: &Tensor<Memory>,
        b: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::concat(a, b, rows, out)
    }

    fn rope(
        &self,
        stream: &mut Stream,
        q: &mut Tensor<Memory>,
        heads: usize,
        nope: usize,
        rope: usize,
        table: &Tensor<Memory>,
        positions: &Tensor<Memory>,
        rows: usize,
    ) -> Result<()> {
        ops::rope(stream, q, heads, nope, rope, table, positions, rows)
    }

    fn cache_write(
        &self,
        stream: &mut Stream,
        kv: Columns<'_, Memory>,
        weight: &Tensor<Memory>,
        eps: f32,
        table: &Tensor<Memory>,
        seqs: &Sequences<Memory>,
        layer: usize,
        rows: usize,
        cache: &Cache,
    ) -> Result<()> {
        ops::cache_write(stream, &kv, weight, eps, table, seqs, layer, rows, cache)
    }

    fn absorb_query(
        &self,
        stream: &mut Stream,
        q: &Tensor<Memory>,
        w_uk: &Heads,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::absorb_query(stream, q, w_uk, rows, out)
    }

    fn attend_absorbed(
        &self,
        stream: &mut Stream,
        q: &Tensor<Memory>,
        cache: &Cache,
        layer: usize,
        seqs: &Sequences<Memory>,
        heads: usize,
        scale: f32,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::attend_absorbed(stream, q, cache, layer, seqs, heads, scale, rows, out)
    }

    fn absorb_value(
        &self,
        stream: &mut Stream,
        x: &Tensor<Memory>,
        w_uv: &Heads,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::absorb_value(stream, x, w_uv, rows, out)
    }

    fn cache_read(
        &self,
        _: &mut Stream,
        cache: &Cache,
        layer: usize,
        seqs: &Sequences<Memory>,
        context_start: &Tensor<Memory>,
        rows: usize,
        latent: &mut Tensor<Memory>,
        rope: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::cache_read(cache, layer, seqs, context_start, rows, latent, rope)
    }

    fn attend_expanded(
        &self,
        stream: &mut Stream,
        q: &Tensor<Memory>,
        kv: &Tensor<Memory>,
        rope: &Tensor<Memory>,
        seqs: &Sequences<Memory>,
        context_start: &Tensor<Memory>,
        heads: usize,
        scale: f32,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::attend_expanded(
            stream,
            q,
            kv,
            rope,
            seqs,
            context_start,
            heads,
            scale,
            rows,
            out,
        )
    }

    fn gate(
        &self,
        stream: &mut Stream,
        x: &Tensor<Memory>,
        weight: &Tensor<Memory>,
        bias: &Tensor<Memory>,
        shape: &GateShape,
        rows: usize,
        out: &mut Routing<Memory>,
        counts: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::gate(stream, x, weight, bias, shape, rows, out, counts)
    }

    fn dispatch(
        &self,
        _: &mut Stream,
        routing: &Routing<Memory>,
        slot_of_expert: &Tensor<Memory>,
        rows: usize,
        slots: usize,
        out: &mut Dispatch<Memory>,
    ) -> Result<()> {
        ops::dispatch(routing, slot_of_expert, rows, slots, out)
    }

    fn experts_gate_up(
        &self,
        stream: &mut Stream,
        x: Input<'_, Memory>,
        experts: &Experts,
        dispatch: &Dispatch<Memory>,
        copies: usize,
        top_k: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::experts_gate_up(stream, &x, experts, dispatch, copies, top_k, out)
    }

    fn experts_down(
        &self,
        stream: &mut Stream,
        x: Input<'_, Memory>,
        experts: &Experts,
        dispatch: &Dispatch<Memory>,
        copies: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::experts_down(stream, &x, experts, dispatch, copies, out)
    }

    fn combine(
        &self,
        stream: &mut Stream,
        y: &Tensor<Memory>,
        routing: &Routing<Memory>,
        dispatch: &Dispatch<Memory>,
        shared: Option<&Tensor<Memory>>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::combine(stream, y, routing, dispatch, shared, rows, out)
    }

    fn argmax(
        &self,
        _: &mut Stream,
        logits: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        ops::argmax(logits, rows, out)
    }
}
