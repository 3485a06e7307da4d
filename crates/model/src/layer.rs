//! One decoder layer (DeepSeek-V3 report, arXiv 2412.19437, section 2.1): attention in both forms, dense MLP, experts.

use kernels::{
    Backend, Tensor,
    backend::{Columns, Input},
};

use crate::{
    config::{Config, LATENT_NORM_EPS},
    error::Result,
    scratch::{MlpBuffers, Scratch},
    weights::{FeedForward, Layer, Linear, Mlp, Moe, Projection},
};

/// What every layer of a step shares.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) config: &'a Config,
    /// Cosine and sine by position.
    pub(crate) rope_table: &'a Tensor<B::Mem>,
    pub(crate) cache: &'a B::Cache,
    /// New tokens of the step.
    pub(crate) rows: usize,
}

impl<B: Backend> Pass<'_, B> {
    /// Runs layer `number`. The residual stream is in `scratch.residual`, except that what the block before added is
    /// still in `scratch.delta` (if `pending`); this layer leaves its own last addition there.
    pub(crate) fn layer(
        &self,
        scratch: &mut Scratch<B>,
        layer: &Layer<B>,
        number: usize,
        pending: bool,
    ) -> Result<()> {
        let readers: &[bool] = match &layer.attention.projection {
            Projection::LowRank { qkv_a, .. } => &[qkv_a.quantised],
            Projection::Direct { q, kv_a } => &[q.quantised, kv_a.quantised],
        };
        let (plain, quantised) = (readers.contains(&false), readers.contains(&true));
        self.add_norm(scratch, &layer.input_norm, pending, plain, quantised)?;
        self.project(scratch, layer, number)?;
        self.attend(scratch, layer, number)?;
        match &layer.feed_forward {
            FeedForward::Dense(mlp) => {
                let quantised = mlp.gate_up.quantised;
                self.add_norm(scratch, &layer.post_norm, true, !quantised, quantised)?;
                let Scratch {
                    stream,
                    normed,
                    dense,
                    delta,
                    ..
                } = scratch;
                let buffers = dense
                    .as_mut()
                    .expect("planned for every network with a dense layer");
                self.mlp(stream, normed.input(quantised), mlp, buffers, delta)
            }
            FeedForward::Moe(moe) => {
                let shared = moe.shared.as_ref().is_some_and(|mlp| mlp.gate_up.quantised);
                // The gate reads plain activations always.
                self.add_norm(
                    scratch,
                    &layer.post_norm,
                    true,
                    true,
                    moe.quantised || shared,
                )?;
                self.moe(scratch, moe, number)
            }
        }
    }

    fn add_norm(
        &self,
        scratch: &mut Scratch<B>,
        weight: &Tensor<B::Mem>,
        pending: bool,
        plain: bool,
        quantised: bool,
    ) -> Result<()> {
        let Scratch {
            stream,
            residual,
            delta,
            normed,
            ..
        } = scratch;
        Ok(self.backend.add_norm(
            stream,
            residual,
            pending.then_some(&*delta),
            weight,
            self.config.rms_norm_eps,
            self.rows,
            normed.output(plain, quantised),
        )?)
    }

    fn matmul(
        &self,
        stream: &mut B::Stream,
        input: Input<'_, B::Mem>,
        linear: &Linear<B>,
        out: &mut Tensor<B::Mem>,
    ) -> Result<()> {
        Ok(self
            .backend
            .matmul(stream, input, &linear.weight, self.rows, out)?)
    }

    /// Queries into `scratch.q`, rotated; latent and rope key into the cache.
    fn project(&self, scratch: &mut Scratch<B>, layer: &Layer<B>, number: usize) -> Result<()> {
        let sizes = &self.config.attention;
        let Scratch {
            stream,
            normed,
            qkv_a,
            q_latent,
            q,
            absorbed,
            ..
        } = scratch;
        let first = match &layer.attention.projection {
            Projection::LowRank {
                qkv_a: weights,
                q_norm,
                q_b,
            } => {
                let rank = q_norm.cols;
                self.matmul(stream, normed.input(weights.quantised), weights, qkv_a)?;
                self.backend.norm(
                    stream,
                    Columns {
                        tensor: qkv_a,
                        first: 0,
                        cols: rank,
                    },
                    q_norm,
                    LATENT_NORM_EPS,
                    self.rows,
                    q_latent.output_for(q_b),
                )?;
                self.matmul(stream, q_latent.input(q_b.quantised), q_b, q)?;
                rank
            }
            Projection::Direct { q: weights, kv_a } => {
                self.matmul(stream, normed.input(weights.quantised), weights, q)?;
                self.matmul(stream, normed.input(kv_a.quantised), kv_a, qkv_a)?;
                0
            }
        };
        self.backend.rope(
            stream,
            q,
            sizes.heads,
            sizes.nope,
            sizes.rope,
            self.rope_table,
            &absorbed.seqs.positions,
            self.rows,
        )?;
        Ok(self.backend.cache_write(
            stream,
            Columns {
                tensor: qkv_a,
                first,
                cols: sizes.entry(),
            },
            &layer.attention.kv_norm,
            LATENT_NORM_EPS,
            self.rope_table,
            &absorbed.seqs,
            number,
            self.rows,
            self.cache,
        )?)
    }

    /// Attention of all sequences and its output projection, into `scratch.delta`.
    fn attend(&self, scratch: &mut Scratch<B>, layer: &Layer<B>, number: usize) -> Result<()> {
        let (backend, cache, weights) = (self.backend, self.cache, &layer.attention);
        let (heads, scale) = (self.config.attention.heads, self.config.attention.scale());
        let Scratch {
            stream,
            plan,
            q,
            q_absorbed,
            o_latent,
            expansion,
            attended,
            delta,
            ..
        } = scratch;
        if plan.absorbed.count() > 0 {
            let seqs = &scratch.absorbed.seqs;
            let rows = plan.absorbed.rows();
            backend.absorb_query(stream, q, &weights.w_uk, rows, q_absorbed)?;
            backend.attend_absorbed(
                stream, q_absorbed, cache, number, seqs, heads, scale, rows, o_latent,
            )?;
            backend.absorb_value(stream, o_latent, &weights.w_uv, rows, &mut attended.plain)?;
        }
        for group in scratch.expanded.iter().take(plan.expanded_count) {
            let (seqs, start) = (&group.seqs, &group.context_start);
            let context = seqs.max_context;
            let (latent, rope, kv) = (
                &mut expansion.latent,
                &mut expansion.rope,
                &mut expansion.kv,
            );
            backend.cache_read(stream, cache, number, seqs, start, context, latent, rope)?;
            let input = Input::Plain(&*latent);
            backend.matmul(stream, input, &weights.kv_b.weight, context, kv)?;
            let out = &mut attended.plain;
            backend.attend_expanded(
                stream, q, kv, rope, seqs, start, heads, scale, self.rows, out,
            )?;
        }
        if weights.o.quantised {
            attended.quantise(backend, stream, self.rows)?;
        }
        self.matmul(
            stream,
            attended.input(weights.o.quantised),
            &weights.o,
            delta,
        )
    }

    fn mlp(
        &self,
        stream: &mut B::Stream,
        input: Input<'_, B::Mem>,
        weights: &Mlp<B>,
        buffers: &mut MlpBuffers<B>,
        out: &mut Tensor<B::Mem>,
    ) -> Result<()> {
        let MlpBuffers { gate_up, inner } = buffers;
        self.matmul(stream, input, &weights.gate_up, gate_up)?;
        self.backend
            .swiglu(stream, gate_up, self.rows, inner.output_for(&weights.down))?;
        self.matmul(
            stream,
            inner.input(weights.down.quantised),
            &weights.down,
            out,
        )
    }

    /// Gate, routed experts, shared expert, into `scratch.delta`.
    fn moe(&self, scratch: &mut Scratch<B>, moe: &Moe<B>, number: usize) -> Result<()> {
        let backend = self.backend;
        let sizes = self
            .config
            .moe
            .as_ref()
            .expect("a layer has experts only if the network has");
        let (top_k, copies) = (sizes.gate.top_k, self.rows * sizes.gate.top_k);
        let Scratch {
            stream,
            normed,
            moe: buffers,
            counts,
            delta,
            ..
        } = scratch;
        let buffers = buffers
            .as_mut()
            .expect("planned for every network with experts");
        let (routing, dispatch) = (&mut buffers.routing, &mut buffers.dispatch);
        let counts = counts[number]
            .as_mut()
            .expect("planned for every layer with experts");
        let shape = sizes.gate.shape();
        let plain = &normed.plain;
        backend.gate(
            stream, plain, &moe.gate, &moe.bias, &shape, self.rows, routing, counts,
        )?;
        backend.dispatch(
            stream,
            routing,
            &moe.slot_of_expert,
            self.rows,
            moe.slots,
            dispatch,
        )?;
        let MlpBuffers { gate_up, inner } = &mut buffers.experts;
        let input = normed.input(moe.quantised);
        backend.experts_gate_up(
            stream,
            input,
            &moe.experts,
            dispatch,
            copies,
            top_k,
            gate_up,
        )?;
        backend.swiglu(
            stream,
            gate_up,
            copies,
            inner.output(!moe.quantised, moe.quantised),
        )?;
        let input = inner.input(moe.quantised);
        let out = &mut buffers.experts_out;
        backend.experts_down(stream, input, &moe.experts, dispatch, copies, out)?;
        let shared = match (&moe.shared, &mut buffers.shared) {
            (Some(weights), Some((buffers, out))) => {
                let input = normed.input(weights.gate_up.quantised);
                self.mlp(stream, input, weights, buffers, out)?;
                Some(&*out)
            }
            _ => None,
        };
        Ok(backend.combine(stream, out, routing, dispatch, shared, self.rows, delta)?)
    }
}
