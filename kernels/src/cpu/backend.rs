//! `Backend` for the CPU: every argument is checked here, so that the loops below only compute.

use super::cache::{BLOCK_TOKENS, Cache};
use super::memory::Memory;
use super::multiply::{Group, Weights, multiply};
use super::pool::Pool;
use super::views::{Acts, Rows, Seqs, Sink, device, ensure, f32s, f32s_mut, i32s, i32s_mut, shape};
use super::{Cpu, Expert, Experts, Heads, Linear, Stream, fast, reference};
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
        Ok(Linear(Weights::new("linear", parts, precision, self.isa)?))
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
            gate_up: Weights::new(op, &[gate.clone(), up.clone()], experts.precision, self.isa)?,
            down: Weights::new(op, std::slice::from_ref(down), experts.precision, self.isa)?,
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
            Weights::new("heads", &[part], precision, self.isa)
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
        stream: &mut Stream,
        table: &Tensor<Memory>,
        tokens: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        self.gather(stream, table, tokens, rows, out)
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
        let op = "add_norm";
        let hidden = residual.cols;
        let delta = delta.map(|d| Rows::of(op, d, rows)).transpose()?;
        let widths = [weight.cols, delta.map_or(hidden, |d| d.cols)];
        ensure(widths == [hidden, hidden], op, || {
            format!("residual of {hidden}, weight and delta of {widths:?}")
        })?;
        let out = Sink::of(op, out, hidden, rows, stream.isa)?;
        let residual = f32s_mut(op, residual, rows)?;
        let weight = f32s(op, weight, 1)?;
        match stream.isa {
            None => reference::add_norm(residual, delta, weight, eps, rows, &out),
            Some(isa) => {
                fast::add_norm(
                    &mut stream.pool,
                    isa,
                    residual,
                    delta,
                    weight,
                    eps,
                    rows,
                    &out,
                );
            }
        }
        Ok(())
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
        let op = "norm";
        let x = Rows::columns(op, &x, rows)?;
        ensure(weight.cols == x.cols, op, || {
            format!("{} columns, weight of {}", x.cols, weight.cols)
        })?;
        let out = Sink::of(op, out, x.cols, rows, stream.isa)?;
        let weight = f32s(op, weight, 1)?;
        match stream.isa {
            None => reference::norm(x, weight, eps, rows, &out),
            Some(isa) => fast::norm(&mut stream.pool, isa, x, weight, eps, rows, &out),
        }
        Ok(())
    }

    fn quantise(
        &self,
        stream: &mut Stream,
        x: &Tensor<Memory>,
        rows: usize,
        scale: ScaleFormat,
        out: &mut Quantised<Memory>,
    ) -> Result<()> {
        let x = Rows::of("quantise", x, rows)?;
        let out = Output {
            plain: None,
            quantised: Some((out, scale)),
        };
        let out = Sink::of("quantise", out, x.cols, rows, stream.isa)?;
        match stream.isa {
            None => reference::quantise(x, rows, &out),
            Some(_) => fast::quantise(&mut stream.pool, x, rows, &out),
        }
        Ok(())
    }

    fn matmul(
        &self,
        stream: &mut Stream,
        x: Input<'_, Memory>,
        weight: &Linear,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "matmul";
        let x = Acts::of(op, &x, rows)?;
        let Linear(weight) = weight;
        fits(op, weight, x.cols(), out.cols)?;
        let stride = out.cols;
        let group = Group {
            weight,
            rows: 0..rows,
            x_first: 0,
            out_first: 0,
        };
        let out = f32s_mut(op, out, rows)?;
        // SAFETY: one group.
        unsafe { multiply(op, stream, x, &|t| t, &[group], out, stride) }
    }

    fn swiglu(
        &self,
        stream: &mut Stream,
        gate_up: &Tensor<Memory>,
        rows: usize,
        out: Output<'_, Memory>,
    ) -> Result<()> {
        let op = "swiglu";
        let gate_up = Rows::of(op, gate_up, rows)?;
        ensure(gate_up.cols.is_multiple_of(2), op, || {
            format!("{} columns are no gate and up", gate_up.cols)
        })?;
        let out = Sink::of(op, out, gate_up.cols / 2, rows, stream.isa)?;
        match stream.isa {
            None => reference::swiglu(gate_up, rows, &out),
            Some(isa) => fast::swiglu(&mut stream.pool, isa, gate_up, rows, &out),
        }
        Ok(())
    }

    fn gather(
        &self,
        _: &mut Stream,
        x: &Tensor<Memory>,
        index: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "gather";
        let index = i32s(op, index, rows)?;
        within(op, index, x.rows)?;
        same_width(op, x, out)?;
        let pairs = index
            .iter()
            .enumerate()
            .map(|(i, from)| (*from as usize, i));
        reference::copy_rows(
            f32s(op, x, x.rows)?,
            f32s_mut(op, out, rows)?,
            x.cols,
            pairs,
        );
        Ok(())
    }

    fn scatter(
        &self,
        _: &mut Stream,
        x: &Tensor<Memory>,
        index: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "scatter";
        let index = i32s(op, index, rows)?;
        within(op, index, out.rows)?;
        same_width(op, x, out)?;
        let (all, cols) = (out.rows, out.cols);
        let pairs = index.iter().enumerate().map(|(i, to)| (i, *to as usize));
        reference::copy_rows(f32s(op, x, rows)?, f32s_mut(op, out, all)?, cols, pairs);
        Ok(())
    }

    fn concat(
        &self,
        _: &mut Stream,
        a: &Tensor<Memory>,
        b: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "concat";
        ensure(out.cols == a.cols + b.cols, op, || {
            format!("{} + {} columns into {}", a.cols, b.cols, out.cols)
        })?;
        let (a, b) = (Rows::of(op, a, rows)?, Rows::of(op, b, rows)?);
        reference::concat(a, b, rows, f32s_mut(op, out, rows)?);
        Ok(())
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
        let op = "rope";
        ensure(
            q.cols == heads * (nope + rope)
                && table.cols == rope
                && rope.is_multiple_of(2)
                && heads > 0,
            op,
            || {
                format!(
                    "rows of {} for {heads} heads of {nope} + {rope}, table of {}",
                    q.cols, table.cols
                )
            },
        )?;
        let positions = i32s(op, positions, rows)?;
        within(op, positions, table.rows)?;
        let table = f32s(op, table, table.rows)?;
        let q = f32s_mut(op, q, rows)?;
        match stream.isa {
            None => reference::rope(q, heads, nope, rope, table, positions),
            Some(_) => fast::rope(&mut stream.pool, q, heads, nope, rope, table, positions),
        }
        Ok(())
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
        let op = "cache_write";
        let kv = Rows::columns(op, &kv, rows)?;
        let rope = table.cols;
        ensure(
            kv.cols == cache.width
                && kv.cols == weight.cols + rope
                && rope.is_multiple_of(2)
                && layer < cache.layers,
            op,
            || {
                format!(
                    "{} columns, weight of {}, table of {rope}, layer {layer} of a cache of {} x {}",
                    kv.cols, weight.cols, cache.layers, cache.width
                )
            },
        )?;
        let slots = i32s(op, &seqs.slots, rows)?;
        let positions = i32s(op, &seqs.positions, rows)?;
        within(op, positions, table.rows)?;
        let end = cache.blocks * BLOCK_TOKENS;
        if let Some(slot) = slots
            .iter()
            .find(|slot| **slot >= 0 && **slot as usize >= end)
        {
            return device(op, format!("slot {slot} of {end}"));
        }
        let weight = f32s(op, weight, 1)?;
        let table = f32s(op, table, table.rows)?;
        let norm = |x: &[f32], out: &mut [f32]| match stream.isa {
            None => reference::norm_row(x, weight, eps, out),
            Some(isa) => fast::norm_row(isa, x, weight, eps, out),
        };
        reference::cache_write(
            kv,
            weight.len(),
            &norm,
            table,
            slots,
            positions,
            layer,
            cache,
        )
    }

    fn absorb_query(
        &self,
        stream: &mut Stream,
        q: &Tensor<Memory>,
        w_uk: &Heads,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "absorb_query";
        let (heads, latent, nope) = (w_uk.matrices.len(), w_uk.out, w_uk.inp);
        let width = out.cols / heads;
        let (q, per_head) = (Rows::of(op, q, rows)?, q.cols / heads);
        let rope = width.saturating_sub(latent);
        ensure(
            out.cols == heads * (latent + rope) && q.cols == heads * (nope + rope),
            op,
            || {
                format!(
                    "{} to {} columns by {heads} of [{latent}, {nope}]",
                    q.cols, out.cols
                )
            },
        )?;
        let stride = out.cols;
        let out = f32s_mut(op, out, rows)?;
        for t in 0..rows {
            let heads = q.row(t).chunks_exact(per_head);
            for (h, head) in heads.enumerate() {
                let to = t * stride + h * width + latent;
                out[to..][..rope].copy_from_slice(&head[nope..]);
            }
        }
        let groups = per_head_groups(w_uk, rows, per_head, width);
        // SAFETY: heads write columns of their own.
        unsafe { multiply(op, stream, Acts::Plain(q), &|t| t, &groups, out, stride) }
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
        let op = "attend_absorbed";
        let latent = out.cols / heads.max(1);
        ensure(
            heads > 0
                && layer < cache.layers
                && q.cols == heads * cache.width
                && out.cols == heads * latent
                && latent <= cache.width,
            op,
            || {
                format!(
                    "{} to {} columns, {heads} heads, layer {layer} of a cache of {} x {}",
                    q.cols, out.cols, cache.layers, cache.width
                )
            },
        )?;
        let seqs = Seqs::of(op, seqs, rows, cache.blocks, BLOCK_TOKENS)?;
        let (q, out) = (Rows::of(op, q, rows)?, f32s_mut(op, out, rows)?);
        match stream.isa {
            None => reference::attend_absorbed(q, cache, layer, seqs, heads, scale, out),
            Some(isa) => fast::attend_absorbed(
                &mut stream.pool,
                isa,
                q,
                cache,
                layer,
                seqs,
                heads,
                scale,
                out,
            ),
        }
    }

    fn absorb_value(
        &self,
        stream: &mut Stream,
        x: &Tensor<Memory>,
        w_uv: &Heads,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "absorb_value";
        let (heads, value, latent) = (w_uv.matrices.len(), w_uv.out, w_uv.inp);
        ensure(
            x.cols == heads * latent && out.cols == heads * value,
            op,
            || {
                format!(
                    "{} to {} columns by {heads} of [{value}, {latent}]",
                    x.cols, out.cols
                )
            },
        )?;
        let (x, stride) = (Rows::of(op, x, rows)?, out.cols);
        let out = f32s_mut(op, out, rows)?;
        let groups = per_head_groups(w_uv, rows, latent, value);
        // SAFETY: heads write columns of their own.
        unsafe { multiply(op, stream, Acts::Plain(x), &|t| t, &groups, out, stride) }
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
        let op = "cache_read";
        let widths = (latent.cols, rope.cols);
        ensure(
            widths.0 + widths.1 == cache.width && layer < cache.layers,
            op,
            || {
                format!(
                    "columns {widths:?}, layer {layer} of {} x {}",
                    cache.layers, cache.width
                )
            },
        )?;
        let seqs = Seqs::of(op, seqs, usize::MAX >> 1, cache.blocks, BLOCK_TOKENS)?;
        let start = starts(op, context_start, seqs, rows)?;
        let latent = (f32s_mut(op, latent, rows)?, widths.0);
        let rope = (f32s_mut(op, rope, rows)?, widths.1);
        reference::cache_read(cache, layer, seqs, start, latent, rope)
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
        let op = "attend_expanded";
        let value = out.cols / heads.max(1);
        let nope = (q.cols / heads.max(1)).saturating_sub(rope.cols);
        ensure(
            heads > 0
                && q.cols == heads * (nope + rope.cols)
                && kv.cols == heads * (nope + value)
                && out.cols == heads * value,
            op,
            || {
                format!(
                    "q of {}, kv of {}, rope of {}, out of {}, {heads} heads",
                    q.cols, kv.cols, rope.cols, out.cols
                )
            },
        )?;
        // The keys are at hand: the block table is not looked at.
        let seqs = Seqs::of(op, seqs, rows, usize::MAX, BLOCK_TOKENS)?;
        let start = starts(op, context_start, seqs, kv.rows.min(rope.rows))?;
        let q = Rows::of(op, q, rows)?;
        let (kv, rope) = (Rows::of(op, kv, kv.rows)?, Rows::of(op, rope, rope.rows)?);
        let out = f32s_mut(op, out, rows)?;
        match stream.isa {
            None => reference::attend_expanded(q, kv, rope, seqs, start, heads, scale, out),
            Some(isa) => {
                let pool = &mut stream.pool;
                fast::attend_expanded(pool, isa, q, kv, rope, seqs, start, heads, scale, out);
            }
        }
        Ok(())
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
        let op = "gate";
        let (n, k) = (shape.experts, shape.top_k);
        ensure(
            shape.groups > 0
                && n.is_multiple_of(shape.groups)
                && (1..=shape.groups).contains(&shape.top_groups)
                && (1..=n / shape.groups * shape.top_groups).contains(&k),
            op,
            || format!("impossible {shape:?}"),
        )?;
        ensure(
            weight.rows >= n
                && weight.cols == x.cols
                && out.experts.cols == k
                && out.weights.cols == k,
            op,
            || {
                format!(
                    "x of {}, weight [{}, {}], top {k} into {} and {}",
                    x.cols, weight.rows, weight.cols, out.experts.cols, out.weights.cols
                )
            },
        )?;
        let bias_rows = bias.rows;
        let bias = f32s(op, bias, bias_rows)?;
        ensure(bias.len() >= n, op, || {
            format!("{} biases for {n} experts", bias.len())
        })?;
        let (x, weight, bias) = (Rows::of(op, x, rows)?, f32s(op, weight, n)?, &bias[..n]);
        let experts = i32s_mut(op, &mut out.experts, rows * k)?;
        let weights = f32s_mut(op, &mut out.weights, rows)?;
        let counts = i32s_mut(op, counts, n)?;
        match stream.isa {
            None => reference::gate(x, weight, bias, shape, experts, weights, counts),
            Some(isa) => fast::gate(
                &mut stream.pool,
                isa,
                x,
                weight,
                bias,
                shape,
                experts,
                weights,
                counts,
            ),
        }
        Ok(())
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
        let op = "dispatch";
        let (top_k, width) = (routing.experts.cols, slot_of_expert.cols);
        ensure(top_k > 0 && width > 1, op, || {
            format!("top {top_k}, {width} columns of slots")
        })?;
        let copies = rows * top_k;
        reference::dispatch(
            i32s(op, &routing.experts, copies)?,
            top_k,
            i32s(op, slot_of_expert, slot_of_expert.rows * width)?,
            width,
            i32s_mut(op, &mut out.offsets, slots + 1)?,
            i32s_mut(op, &mut out.copy_of_row, copies)?,
            i32s_mut(op, &mut out.row_of_copy, copies)?,
        )
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
        let op = "experts_gate_up";
        ensure(top_k > 0 && copies.is_multiple_of(top_k), op, || {
            format!("{copies} copies of top {top_k}")
        })?;
        let x = Acts::of(op, &x, copies / top_k)?;
        let copy_of_row = i32s(op, &dispatch.copy_of_row, copies)?;
        within(op, copy_of_row, copies)?;
        let stride = out.cols;
        let out = f32s_mut(op, out, copies)?;
        let groups = slot_groups(
            op,
            experts,
            |e| &e.gate_up,
            dispatch,
            copies,
            (x.cols(), stride),
        )?;
        let token = |row: usize| copy_of_row[row] as usize / top_k;
        // SAFETY: slots have rows of their own.
        unsafe { multiply(op, stream, x, &token, &groups, out, stride) }
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
        let op = "experts_down";
        let x = Acts::of(op, &x, copies)?;
        let stride = out.cols;
        let out = f32s_mut(op, out, copies)?;
        let groups = slot_groups(
            op,
            experts,
            |e| &e.down,
            dispatch,
            copies,
            (x.cols(), stride),
        )?;
        // SAFETY: slots have rows of their own.
        unsafe { multiply(op, stream, x, &|row| row, &groups, out, stride) }
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
        let op = "combine";
        let top_k = routing.weights.cols;
        let copies = rows * top_k;
        let shared = shared.map(|s| Rows::of(op, s, rows)).transpose()?;
        let widths = [out.cols, shared.map_or(out.cols, |s| s.cols)];
        ensure(widths == [y.cols, y.cols], op, || {
            format!("y of {}, output and shared of {widths:?}", y.cols)
        })?;
        let row_of_copy = i32s(op, &dispatch.row_of_copy, copies)?;
        within(op, row_of_copy, copies)?;
        let y = Rows::of(op, y, copies)?;
        let weights = f32s(op, &routing.weights, rows)?;
        let out = f32s_mut(op, out, rows)?;
        match stream.isa {
            None => reference::combine(y, weights, row_of_copy, top_k, shared, out),
            Some(isa) => {
                let pool = &mut stream.pool;
                fast::combine(pool, isa, y, weights, row_of_copy, top_k, shared, out);
            }
        }
        Ok(())
    }

    fn argmax(
        &self,
        _: &mut Stream,
        logits: &Tensor<Memory>,
        rows: usize,
        out: &mut Tensor<Memory>,
    ) -> Result<()> {
        let op = "argmax";
        ensure(logits.cols > 0, op, || "rows of nothing".into())?;
        reference::argmax(Rows::of(op, logits, rows)?, i32s_mut(op, out, rows)?);
        Ok(())
    }
}

/// Checks a product's inputs and outputs.
fn fits(op: &'static str, weight: &Weights, inputs: usize, outputs: usize) -> Result<()> {
    ensure(
        weight.cols() == inputs && weight.rows() == outputs,
        op,
        || {
            format!(
                "{inputs} to {outputs} columns by [{}, {}]",
                weight.rows(),
                weight.cols()
            )
        },
    )
}

fn same_width(op: &'static str, a: &Tensor<Memory>, b: &Tensor<Memory>) -> Result<()> {
    ensure(a.cols == b.cols, op, || {
        format!("{} and {} columns", a.cols, b.cols)
    })
}

/// Checks that every index is in `0..end`.
fn within(op: &'static str, index: &[i32], end: usize) -> Result<()> {
    match index.iter().find(|i| **i < 0 || **i as usize >= end) {
        Some(i) => device(op, format!("index {i} of {end}")),
        None => Ok(()),
    }
}

/// Where each sequence's context begins, checked to end within `rows`.
fn starts<'a>(
    op: &'static str,
    context_start: &'a Tensor<Memory>,
    seqs: Seqs<'_>,
    rows: usize,
) -> Result<&'a [i32]> {
    let start = i32s(op, context_start, seqs.count)?;
    for (s, first) in start.iter().enumerate() {
        if *first < 0 || *first as usize + seqs.context(s) > rows {
            return device(
                op,
                format!("context {s}: {first} + {} of {rows}", seqs.context(s)),
            );
        }
    }
    Ok(start)
}

/// One product per head: inputs from column `h * x_width` on, outputs from `h * out_width` on.
fn per_head_groups(heads: &Heads, rows: usize, x_width: usize, out_width: usize) -> Vec<Group<'_>> {
    let group = |(h, weight)| Group {
        weight,
        rows: 0..rows,
        x_first: h * x_width,
        out_first: h * out_width,
    };
    heads.matrices.iter().enumerate().map(group).collect()
}

/// One product per slot that has rows, of the matrix that `pick` takes, checked to be of `shape` (inputs, outputs).
fn slot_groups<'a>(
    op: &'static str,
    experts: &'a Experts,
    pick: impl Fn(&Expert) -> &Weights,
    dispatch: &Dispatch<Memory>,
    copies: usize,
    shape: (usize, usize),
) -> Result<Vec<Group<'a>>> {
    let offsets = i32s(op, &dispatch.offsets, experts.slots.len() + 1)?;
    let mut groups = Vec::new();
    for (slot, expert) in experts.slots.iter().enumerate() {
        let (start, end) = (offsets[slot], offsets[slot + 1]);
        if start < 0 || end < start || end as usize > copies {
            return device(
                op,
                format!("slot {slot} has rows {start}..{end} of {copies}"),
            );
        }
        if start == end {
            continue;
        }
        let Some(expert) = expert else {
            return device(op, format!("slot {slot} is empty"));
        };
        let weight = pick(expert);
        fits(op, weight, shape.0, shape.1)?;
        groups.push(Group {
            weight,
            rows: start as usize..end as usize,
            x_first: 0,
            out_first: 0,
        });
    }
    Ok(groups)
}
