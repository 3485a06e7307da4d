//! The whole network: weights in a backend, and the step that turns new tokens into logits.
//!
//! One [`Network`] serves any number of threads, each with a [`Scratch`] of its own and all over one cache.

use std::sync::Arc;

use kernels::{
    Backend, BlockMemory as _, DType, Precision, Tensor,
    backend::{Input, Output, Routing},
};

use crate::{
    checkpoint::Checkpoint,
    config::Config,
    error::{Error, Result},
    layer::Pass,
    scratch::{Scratch, put},
    step::{Bounds, Form, Limits, Pending, Sequence},
    weights::{Loader, Mtp, Progress, Trunk},
};

/// A loaded network.
pub struct Network<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) config: Config,
    precision: Precision,
    limits: Limits,
    /// Cosine and sine, `[max_context, rope]`.
    pub(crate) rope_table: Tensor<B::Mem>,
    pub(crate) trunk: Trunk<B>,
    pub(crate) mtp: Option<Mtp<B>>,
}

/// A layer whose work is enqueued (on the CPU: done).
pub struct LayerDone<'a, B: Backend> {
    /// The layer; the MTP layer's number is the trunk's number of layers.
    pub layer: usize,
    /// The backend, for enqueueing more.
    pub backend: &'a B,
    /// The step's stream.
    pub stream: &'a mut B::Stream,
    /// The gate's choices, for layers with experts: rows as in the step (absorbed sequences first).
    pub routing: Option<&'a Routing<B::Mem>>,
}

impl<B: Backend> Network<B> {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// Whatever is wrong with checkpoint, precision or limits, and the backend's lack of memory.
    pub fn load(
        backend: Arc<B>,
        checkpoint: &Checkpoint,
        precision: Precision,
        limits: Limits,
        on_progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        limits.check()?;
        checkpoint.check_precision(precision)?;
        let config = checkpoint.config().clone();
        let loader = Loader {
            backend: &*backend,
            checkpoint,
            precision,
        };
        let total = config.kv_layers(limits.mtp);
        let trunk = loader.trunk(&mut |layers| on_progress(Progress { layers, total }))?;
        let mtp = (limits.mtp && config.mtp)
            .then(|| loader.mtp())
            .transpose()?;
        on_progress(Progress {
            layers: total,
            total,
        });
        let table = config.attention.rotary.table(limits.max_context);
        let rope_table = backend.import(
            DType::F32,
            limits.max_context,
            config.attention.rope,
            bytemuck::cast_slice(&table),
        )?;
        Ok(Self {
            backend,
            config,
            precision,
            limits,
            rope_table,
            trunk,
            mtp,
        })
    }

    /// Sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How it is computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bounds of a step.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Layers of the cache: the trunk's, and the MTP layer's if it is loaded.
    pub fn kv_layers(&self) -> usize {
        self.config.layers + usize::from(self.mtp.is_some())
    }

    /// Element type of the cache: float32 for the float32 precision, otherwise BF16.
    pub fn cache_dtype(&self) -> DType {
        match self.precision {
            Precision::F32 => DType::F32,
            _ => DType::Bf16,
        }
    }

    /// The form for a prompt, see [`Limits::form`].
    pub fn form(&self, new_tokens: usize, context: usize) -> Form {
        self.limits.form(new_tokens, context)
    }

    /// A cache of `blocks` blocks.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn cache(&self, blocks: usize) -> Result<B::Cache> {
        let width = self.config.attention.entry();
        Ok(self
            .backend
            .cache(blocks, self.kv_layers(), width, self.cache_dtype())?)
    }

    /// Memory for steps on one thread.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn scratch(&self) -> Result<Scratch<B>> {
        let bounds = self.bounds(usize::MAX);
        let mtp = self.mtp.is_some();
        Scratch::plan(&self.backend, &self.config, self.precision, &bounds, mtp)
    }

    fn bounds(&self, blocks: usize) -> Bounds {
        let limits = Limits {
            mtp: self.mtp.is_some(),
            ..self.limits
        };
        Bounds {
            limits,
            vocab_size: self.config.vocab_size,
            blocks,
        }
    }

    /// Computes the new tokens of `sequences`: their cache entries in every layer, and the logits asked for,
    /// `[rows, vocab]` in the order of the sequences, which replace what is in `logits`.
    ///
    /// `on_layer` is called once for every layer of the cache, in order.
    ///
    /// # Errors
    /// If a sequence breaks a rule of [`Sequence`], before anything is computed; or the backend's or the callback's error.
    pub fn forward(
        &self,
        scratch: &mut Scratch<B>,
        sequences: &[Sequence<'_>],
        cache: &B::Cache,
        on_layer: &mut dyn FnMut(LayerDone<'_, B>) -> Result<()>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        scratch
            .plan
            .lay_out(sequences, &self.bounds(cache.blocks()))?;
        scratch.upload_plan(&self.backend)?;
        let backend = &*self.backend;
        let pass = self.pass(cache, scratch.plan.tokens.len());
        let Scratch {
            stream,
            tokens,
            residual,
            ..
        } = scratch;
        backend.embed(stream, &self.trunk.embedding, tokens, pass.rows, residual)?;
        for (number, layer) in self.trunk.layers.iter().enumerate() {
            pass.layer(scratch, layer, number, number > 0)?;
            self.report(scratch, number, on_layer)?;
        }
        self.last_norm(scratch, &self.trunk.norm, pass.rows)?;
        self.logits(scratch, logits)?;
        if let Some(mtp) = &self.mtp {
            self.fill_mtp(scratch, mtp, cache)?;
            self.keep_states(scratch)?;
            self.report(scratch, self.config.layers, on_layer)?;
        }
        Ok(backend.synchronize(&mut scratch.stream)?)
    }

    /// Makes MTP entries whose next token has become known without a step of its sequence: after the last token of a
    /// prefill whose sequence goes on elsewhere.
    ///
    /// # Errors
    /// If an entry is out of bounds, or the backend's error.
    pub fn fill_last(
        &self,
        scratch: &mut Scratch<B>,
        pending: &[Pending<'_>],
        cache: &B::Cache,
    ) -> Result<()> {
        let Some(mtp) = &self.mtp else { return Ok(()) };
        scratch
            .plan
            .lay_out_pending(pending, &self.bounds(cache.blocks()))?;
        self.fill_mtp(scratch, mtp, cache)?;
        Ok(self.backend.synchronize(&mut scratch.stream)?)
    }

    /// Guesses the token after each pending entry's token with the MTP layer, one step on from the trunk's own logits:
    /// makes the entries like [`Network::fill_last`] and writes `[pending, vocab]` logits. The entries before them must
    /// be there for the guesses to be good ones.
    ///
    /// # Errors
    /// As [`Network::fill_last`]; without an MTP layer nothing can be drafted.
    pub fn draft(
        &self,
        scratch: &mut Scratch<B>,
        pending: &[Pending<'_>],
        cache: &B::Cache,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let Some(mtp) = &self.mtp else {
            return Err(Error::Step("no MTP layer is loaded".into()));
        };
        scratch
            .plan
            .lay_out_pending(pending, &self.bounds(cache.blocks()))?;
        scratch.upload_plan(&self.backend)?;
        self.mtp_input(scratch, mtp)?;
        let (number, rows) = (self.config.layers, pending.len());
        self.pass(cache, rows)
            .layer(scratch, &mtp.layer, number, false)?;
        self.last_norm(scratch, &mtp.head_norm, rows)?;
        self.logits(scratch, logits)?;
        Ok(self.backend.synchronize(&mut scratch.stream)?)
    }

    /// Hands out, layer by layer, how many tokens chose each logical expert since the last call, and starts from zero.
    ///
    /// # Errors
    /// The backend's.
    pub fn take_expert_counts(
        &self,
        scratch: &mut Scratch<B>,
        see: &mut dyn FnMut(usize, &[u32]),
    ) -> Result<()> {
        let backend = &*self.backend;
        let Scratch {
            stream,
            counts,
            host_counts,
            ..
        } = scratch;
        for (layer, counts) in counts.iter_mut().enumerate() {
            let Some(counts) = counts else { continue };
            backend.download(stream, counts, bytemuck::cast_slice_mut(host_counts))?;
            backend.synchronize(stream)?;
            see(layer, host_counts);
            host_counts.fill(0);
            backend.upload(stream, bytemuck::cast_slice(host_counts), counts)?;
            backend.synchronize(stream)?;
        }
        Ok(())
    }

    pub(crate) fn pass<'a>(&'a self, cache: &'a B::Cache, rows: usize) -> Pass<'a, B> {
        Pass {
            backend: &self.backend,
            config: &self.config,
            rope_table: &self.rope_table,
            cache,
            rows,
        }
    }

    fn report(
        &self,
        scratch: &mut Scratch<B>,
        layer: usize,
        on_layer: &mut dyn FnMut(LayerDone<'_, B>) -> Result<()>,
    ) -> Result<()> {
        let has_routing = layer < self.config.layers && self.config.is_moe(layer);
        let routing = scratch
            .moe
            .as_ref()
            .map(|moe| &moe.routing)
            .filter(|_| has_routing);
        let stream = &mut scratch.stream;
        on_layer(LayerDone {
            layer,
            backend: &*self.backend,
            stream,
            routing,
        })
    }

    /// The norm before the head, into the first rows of `scratch.states`.
    fn last_norm(
        &self,
        scratch: &mut Scratch<B>,
        weight: &Tensor<B::Mem>,
        rows: usize,
    ) -> Result<()> {
        let Scratch {
            stream,
            residual,
            delta,
            states,
            ..
        } = scratch;
        let out = Output {
            plain: Some(states),
            quantised: None,
        };
        let eps = self.config.rms_norm_eps;
        Ok(self
            .backend
            .add_norm(stream, residual, Some(delta), weight, eps, rows, out)?)
    }

    /// Logits of the planned rows, a bounded number of rows at a time.
    fn logits(&self, scratch: &mut Scratch<B>, logits: &mut Vec<f32>) -> Result<()> {
        let (backend, vocab) = (&*self.backend, self.config.vocab_size);
        let at_once = scratch.logit_rows();
        logits.resize(scratch.plan.logits.len() * vocab, 0.0);
        let Scratch {
            stream,
            plan,
            states,
            index,
            picked,
            logits: device,
            ..
        } = scratch;
        let head = &self.trunk.head.weight;
        for (rows, out) in plan
            .logits
            .chunks(at_once)
            .zip(logits.chunks_mut(at_once * vocab))
        {
            put(backend, stream, rows, index)?;
            backend.gather(stream, states, index, rows.len(), picked)?;
            let input = Input::Plain(&*picked);
            backend.matmul(stream, input, head, rows.len(), device)?;
            backend.download(stream, device, bytemuck::cast_slice_mut(out))?;
        }
        Ok(())
    }
}
