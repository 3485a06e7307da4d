//! Memory of a step, planned once from the limits' upper bounds: a step allocates nothing on the device.

use kernels::{
    Backend, DType, Precision, Tensor,
    backend::{Dispatch, Input, Output, Quantised, Routing, ScaleFormat, Sequences},
};

use crate::{
    config::Config,
    error::Result,
    step::{Bounds, Group, Limits, Plan},
    weights::{Linear, scale_format},
};

/// Columns that share an activation scale.
const SCALE_COLUMNS: usize = 128;

/// Activations between two operations: plain and, for W8A8, quantised.
pub(crate) struct Activations<B: Backend> {
    pub(crate) plain: Tensor<B::Mem>,
    quantised: Option<Quantised<B::Mem>>,
    format: ScaleFormat,
    /// Products take what is plain as BF16.
    rounded: bool,
}

impl<B: Backend> Activations<B> {
    /// Where an operation writes what `plain` and `quantised` readers need.
    pub(crate) fn output(&mut self, plain: bool, quantised: bool) -> Output<'_, B::Mem> {
        let format = self.format;
        Output {
            plain: plain.then_some(&mut self.plain),
            quantised: self
                .quantised
                .as_mut()
                .filter(|_| quantised)
                .map(|q| (q, format)),
        }
    }

    /// Where an operation writes for one linear layer.
    pub(crate) fn output_for(&mut self, reader: &Linear<B>) -> Output<'_, B::Mem> {
        self.output(!reader.quantised, reader.quantised)
    }

    /// What a product reads.
    pub(crate) fn input(&self, quantised: bool) -> Input<'_, B::Mem> {
        match &self.quantised {
            Some(values) if quantised => Input::Quantised(values),
            _ if self.rounded => Input::Rounded(&self.plain),
            _ => Input::Plain(&self.plain),
        }
    }

    /// Quantises what an operation left plain.
    pub(crate) fn quantise(
        &mut self,
        backend: &B,
        stream: &mut B::Stream,
        rows: usize,
    ) -> kernels::Result<()> {
        match &mut self.quantised {
            Some(out) => backend.quantise(stream, &self.plain, rows, self.format, out),
            None => Ok(()),
        }
    }
}

/// A [`Group`] in device memory.
pub(crate) struct DeviceGroup<B: Backend> {
    pub(crate) seqs: Sequences<B::Mem>,
    /// `[2]`: 0 and the context length, for the expanded form.
    pub(crate) context_start: Tensor<B::Mem>,
}

/// Buffers of the expanded form: keys and values of one sequence's whole context.
pub(crate) struct Expansion<B: Backend> {
    pub(crate) latent: Tensor<B::Mem>,
    pub(crate) rope: Tensor<B::Mem>,
    pub(crate) kv: Tensor<B::Mem>,
}

/// Buffers of an MLP.
pub(crate) struct MlpBuffers<B: Backend> {
    pub(crate) gate_up: Tensor<B::Mem>,
    pub(crate) inner: Activations<B>,
}

/// Buffers of routed experts: a row for every copy of a token.
pub(crate) struct MoeBuffers<B: Backend> {
    pub(crate) routing: Routing<B::Mem>,
    pub(crate) dispatch: Dispatch<B::Mem>,
    pub(crate) experts: MlpBuffers<B>,
    pub(crate) experts_out: Tensor<B::Mem>,
    pub(crate) shared: Option<(MlpBuffers<B>, Tensor<B::Mem>)>,
}

/// Buffers of the MTP layer's input.
pub(crate) struct MtpBuffers<B: Backend> {
    /// Slots and positions of its rows; the rest is not used.
    pub(crate) seqs: Sequences<B::Mem>,
    pub(crate) index: Tensor<B::Mem>,
    pub(crate) tokens: Tensor<B::Mem>,
    pub(crate) hidden: Tensor<B::Mem>,
    pub(crate) embedded: Tensor<B::Mem>,
    pub(crate) hidden_normed: Tensor<B::Mem>,
    pub(crate) joined: Tensor<B::Mem>,
}

/// Memory of steps: one for each thread that steps.
pub struct Scratch<B: Backend> {
    pub(crate) stream: B::Stream,
    pub(crate) plan: Plan,
    pub(crate) tokens: Tensor<B::Mem>,
    pub(crate) absorbed: DeviceGroup<B>,
    pub(crate) expanded: Vec<DeviceGroup<B>>,
    pub(crate) residual: Tensor<B::Mem>,
    pub(crate) normed: Activations<B>,
    /// `q_a | kv_a`, or `kv_a` alone without a query latent.
    pub(crate) qkv_a: Tensor<B::Mem>,
    pub(crate) q_latent: Activations<B>,
    pub(crate) q: Tensor<B::Mem>,
    pub(crate) q_absorbed: Tensor<B::Mem>,
    pub(crate) o_latent: Tensor<B::Mem>,
    pub(crate) expansion: Expansion<B>,
    pub(crate) attended: Activations<B>,
    /// What a block adds to the residual stream.
    pub(crate) delta: Tensor<B::Mem>,
    pub(crate) dense: Option<MlpBuffers<B>>,
    pub(crate) moe: Option<MoeBuffers<B>>,
    /// Tokens of each expert since they were last taken, by MoE layer.
    pub(crate) counts: Vec<Option<Tensor<B::Mem>>>,
    /// Post-norm states: this step's rows, then the kept ones.
    pub(crate) states: Tensor<B::Mem>,
    pub(crate) index: Tensor<B::Mem>,
    pub(crate) picked: Tensor<B::Mem>,
    pub(crate) logits: Tensor<B::Mem>,
    pub(crate) mtp: Option<MtpBuffers<B>>,
    pub(crate) host_counts: Vec<u32>,
}

/// Most rows whose logits are computed at once; more go round by round.
const LOGIT_ROWS: usize = 128;

/// Allocates with one type and precision.
struct Planner<'a, B: Backend> {
    backend: &'a B,
    dtype: DType,
    precision: Precision,
    format: ScaleFormat,
}

impl<B: Backend> Planner<'_, B> {
    fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor<B::Mem>> {
        Ok(self.backend.alloc(self.dtype, rows, cols)?)
    }

    fn ints(&self, rows: usize, cols: usize) -> Result<Tensor<B::Mem>> {
        Ok(self.backend.alloc(DType::I32, rows, cols)?)
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<Activations<B>> {
        let quantised = match self.precision {
            Precision::W8A8 => Some(Quantised {
                data: self.backend.alloc(DType::Fp8, rows, cols)?,
                scales: self
                    .backend
                    .alloc(DType::F32, rows, cols.div_ceil(SCALE_COLUMNS))?,
            }),
            _ => None,
        };
        Ok(Activations {
            plain: self.tensor(rows, cols)?,
            quantised,
            format: self.format,
            rounded: self.precision == Precision::Bf16,
        })
    }

    fn mlp(&self, rows: usize, inter: usize) -> Result<MlpBuffers<B>> {
        Ok(MlpBuffers {
            gate_up: self.tensor(rows, 2 * inter)?,
            inner: self.activations(rows, inter)?,
        })
    }

    fn sequences(&self, count: usize, limits: &Limits, stride: usize) -> Result<Sequences<B::Mem>> {
        Ok(Sequences {
            query_start: self.ints(count + 1, 1)?,
            context_len: self.ints(count, 1)?,
            block_table: self.ints(count, stride)?,
            slots: self.ints(limits.max_tokens, 1)?,
            positions: self.ints(limits.max_tokens, 1)?,
            count: 0,
            max_query: 0,
            max_context: 0,
        })
    }

    fn group(&self, count: usize, limits: &Limits, stride: usize) -> Result<DeviceGroup<B>> {
        let seqs = self.sequences(count, limits, stride)?;
        Ok(DeviceGroup {
            seqs,
            context_start: self.ints(2, 1)?,
        })
    }

    fn moe(&self, config: &Config, tokens: usize) -> Result<Option<MoeBuffers<B>>> {
        let Some(moe) = &config.moe else {
            return Ok(None);
        };
        let (top_k, hidden) = (moe.gate.top_k, config.hidden_size);
        let copies = tokens * top_k;
        Ok(Some(MoeBuffers {
            routing: Routing {
                experts: self.ints(tokens, top_k)?,
                weights: self.backend.alloc(DType::F32, tokens, top_k)?,
            },
            dispatch: Dispatch {
                offsets: self.ints(moe.gate.experts + 1, 1)?,
                copy_of_row: self.ints(copies, 1)?,
                row_of_copy: self.ints(copies, 1)?,
            },
            experts: self.mlp(copies, moe.inter)?,
            experts_out: self.tensor(copies, hidden)?,
            shared: match moe.shared {
                0 => None,
                shared => Some((
                    self.mlp(tokens, shared * moe.inter)?,
                    self.tensor(tokens, hidden)?,
                )),
            },
        }))
    }

    fn mtp(&self, config: &Config, limits: &Limits, stride: usize) -> Result<MtpBuffers<B>> {
        let (rows, hidden) = (limits.max_tokens, config.hidden_size);
        Ok(MtpBuffers {
            seqs: self.sequences(1, limits, stride)?,
            index: self.ints(rows, 1)?,
            tokens: self.ints(rows, 1)?,
            hidden: self.tensor(rows, hidden)?,
            embedded: self.tensor(rows, hidden)?,
            hidden_normed: self.tensor(rows, hidden)?,
            joined: self.tensor(rows, 2 * hidden)?,
        })
    }
}

impl<B: Backend> Scratch<B> {
    pub(crate) fn plan(
        backend: &B,
        config: &Config,
        precision: Precision,
        bounds: &Bounds,
        mtp: bool,
    ) -> Result<Self> {
        let planner = Planner {
            backend,
            dtype: backend.activation(precision),
            precision,
            format: scale_format(config),
        };
        let (limits, stride) = (&bounds.limits, bounds.stride());
        let (tokens, hidden, a) = (limits.max_tokens, config.hidden_size, &config.attention);
        let context = limits.max_expanded_context.min(limits.max_context);
        // Without room to expand no sequence may, so the buffers shrink to one row.
        let (expanded, context) = match context {
            0 => (0, 1),
            context => (limits.max_sequences.min(tokens), context),
        };
        let has_dense = (0..config.kv_layers(mtp)).any(|layer| !config.is_moe(layer));
        let logit_rows = LOGIT_ROWS.min(tokens);
        let mut scratch = Self {
            stream: backend.stream()?,
            plan: Plan::default(),
            tokens: planner.ints(tokens, 1)?,
            absorbed: planner.group(limits.max_sequences, limits, stride)?,
            expanded: (0..expanded)
                .map(|_| planner.group(1, limits, stride))
                .collect::<Result<_>>()?,
            residual: planner.tensor(tokens, hidden)?,
            normed: planner.activations(tokens, hidden)?,
            qkv_a: planner.tensor(tokens, a.q_lora_rank.unwrap_or(0) + a.entry())?,
            q_latent: planner.activations(tokens, a.q_lora_rank.unwrap_or(1))?,
            q: planner.tensor(tokens, a.heads * a.qk())?,
            q_absorbed: planner.tensor(tokens, a.heads * a.entry())?,
            o_latent: planner.tensor(tokens, a.heads * a.kv_lora_rank)?,
            expansion: Expansion {
                latent: planner.tensor(context, a.kv_lora_rank)?,
                rope: planner.tensor(context, a.rope)?,
                kv: planner.tensor(context, a.heads * (a.nope + a.v))?,
            },
            attended: planner.activations(tokens, a.heads * a.v)?,
            delta: planner.tensor(tokens, hidden)?,
            dense: has_dense
                .then(|| planner.mlp(tokens, config.dense_inter))
                .transpose()?,
            moe: planner.moe(config, tokens)?,
            counts: Vec::new(),
            states: planner.tensor(tokens + limits.max_states, hidden)?,
            index: planner.ints(tokens, 1)?,
            picked: planner.tensor(logit_rows.max(limits.max_sequences), hidden)?,
            logits: backend.alloc(DType::F32, logit_rows, config.vocab_size)?,
            mtp: mtp
                .then(|| planner.mtp(config, limits, stride))
                .transpose()?,
            host_counts: Vec::new(),
        };
        if let Some(moe) = &config.moe {
            let zeros = vec![0u8; moe.gate.experts * 4];
            for layer in 0..config.kv_layers(mtp) {
                let counts = backend.import(DType::I32, moe.gate.experts, 1, &zeros)?;
                scratch.counts.push(config.is_moe(layer).then_some(counts));
            }
            scratch.host_counts = vec![0; moe.gate.experts];
        }
        Ok(scratch)
    }

    /// Rows whose logits are computed at once.
    pub(crate) fn logit_rows(&self) -> usize {
        self.logits.rows
    }

    /// Brings the plan to the device.
    pub(crate) fn upload_plan(&mut self, backend: &B) -> Result<()> {
        let (plan, stream) = (&self.plan, &mut self.stream);
        put(backend, stream, &plan.tokens, &mut self.tokens)?;
        self.absorbed
            .upload(backend, stream, &plan.absorbed, plan)?;
        let groups = self.expanded.iter_mut().zip(&plan.expanded);
        for (device, group) in groups.take(plan.expanded_count) {
            device.upload(backend, stream, group, plan)?;
        }
        Ok(())
    }
}

impl<B: Backend> DeviceGroup<B> {
    fn upload(
        &mut self,
        backend: &B,
        stream: &mut B::Stream,
        group: &Group,
        plan: &Plan,
    ) -> Result<()> {
        let seqs = &mut self.seqs;
        put(backend, stream, &group.query_start, &mut seqs.query_start)?;
        put(backend, stream, &group.context_len, &mut seqs.context_len)?;
        put(backend, stream, &group.block_table, &mut seqs.block_table)?;
        put(backend, stream, &plan.slots, &mut seqs.slots)?;
        put(backend, stream, &plan.positions, &mut seqs.positions)?;
        let context_start = [0, group.context_len.first().copied().unwrap_or(0)];
        put(backend, stream, &context_start, &mut self.context_start)?;
        seqs.count = group.count();
        seqs.max_query = group.max_query;
        seqs.max_context = group.max_context;
        Ok(())
    }
}

/// Copies integers to the first elements of a tensor.
pub(crate) fn put<B: Backend>(
    backend: &B,
    stream: &mut B::Stream,
    values: &[i32],
    to: &mut Tensor<B::Mem>,
) -> Result<()> {
    if values.is_empty() {
        return Ok(());
    }
    Ok(backend.upload(stream, bytemuck::cast_slice(values), to)?)
}
