//! The real network behind the scheduler's [`Runner`].

use std::sync::Arc;

use kernels::{Backend, BlockMemory};
use kv::{BlockId, KvFormat};
use model::{Form, LayerDone, Network, Pending, Scratch, Sequence, State};

use crate::{
    ExpertLoad, Runner,
    runner::{Facts, Last, Row, RunnerError, StepHeader},
};

/// A loaded network, its cache and the memory of its steps.
///
/// Prompts are computed in the expanded form (unless the network's limits leave no room for it), generated tokens in the
/// absorbed one, whatever the length: so a token's bits depend on the sequence alone, not on chunks, on what of its prefix
/// was cached, or on where it was computed first. Replays after a preemption or on another worker are exact.
pub struct NetworkRunner<B: Backend> {
    network: Network<B>,
    scratch: Scratch<B>,
    cache: Arc<B::Cache>,
    facts: Facts,
    prompt_form: Form,
}

impl<B: Backend> NetworkRunner<B> {
    /// Puts a cache of `blocks` blocks beside a network. `revision` names what computes the KV.
    ///
    /// # Errors
    /// If the device has no memory for cache and steps.
    pub fn new(network: Network<B>, blocks: usize, revision: String) -> model::Result<Self> {
        let config = network.config();
        let limits = network.limits();
        let draft_layer = network.kv_layers() > config.layers;
        let prompt_form = if limits.max_expanded_context >= limits.max_context {
            Form::Expanded
        } else {
            Form::Absorbed
        };
        let facts = Facts {
            vocab_size: config.vocab_size,
            max_model_len: limits.max_context,
            max_rows: limits.max_sequences.min(if draft_layer {
                limits.max_states
            } else {
                usize::MAX
            }),
            max_step_tokens: limits.max_tokens,
            format: KvFormat {
                revision,
                layers: network.kv_layers(),
                latent: config.attention.kv_lora_rank,
                rope: config.attention.rope,
                dtype: network.cache_dtype(),
            },
            draft_layer,
            prompts_differ: prompt_form != Form::Absorbed,
            moe_layers: (0..network.kv_layers())
                .filter(|&l| config.is_moe(l))
                .collect(),
            experts: config.moe.as_ref().map_or(0, |moe| moe.gate.experts),
        };
        Ok(Self {
            scratch: network.scratch()?,
            cache: Arc::new(network.cache(blocks)?),
            network,
            facts,
            prompt_form,
        })
    }
}

impl<B: Backend> Runner for NetworkRunner<B>
where
    Scratch<B>: Send,
{
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn memory(&self) -> Arc<dyn BlockMemory> {
        Arc::<B::Cache>::clone(&self.cache)
    }

    fn forward(
        &mut self,
        _step: &StepHeader,
        rows: &[Row<'_>],
        on_layer: &mut dyn FnMut(usize) -> Result<(), RunnerError>,
        logits: &mut Vec<f32>,
    ) -> Result<(), RunnerError> {
        let tables: Vec<Vec<u32>> = rows.iter().map(|row| table(row.blocks)).collect();
        let sequence = |(row, blocks)| {
            let (row, blocks): (&Row<'_>, &Vec<u32>) = (row, blocks);
            Sequence {
                tokens: &row.tokens[row.first..],
                first: row.first,
                blocks,
                form: if row.prompt {
                    self.prompt_form
                } else {
                    Form::Absorbed
                },
                logits: row.logits.start - row.first..row.logits.end - row.first,
                state: self.facts.draft_layer.then_some(State {
                    row: row.state,
                    previous: row.continues,
                }),
            }
        };
        let sequences: Vec<Sequence<'_>> = rows.iter().zip(&tables).map(sequence).collect();
        let mut on_layer = |done: LayerDone<'_, B>| {
            // Who reads the cache on the host sees what the device has finished.
            done.backend.synchronize(done.stream)?;
            on_layer(done.layer).map_err(|e| model::Error::Step(e.0))
        };
        self.network
            .forward(
                &mut self.scratch,
                &sequences,
                &self.cache,
                &mut on_layer,
                logits,
            )
            .map_err(failed)
    }

    fn fill_last(&mut self, last: &[Last<'_>]) -> Result<(), RunnerError> {
        let tables: Vec<Vec<u32>> = last.iter().map(|last| table(last.blocks)).collect();
        let pending: Vec<Pending<'_>> = last
            .iter()
            .zip(&tables)
            .map(|(last, blocks)| Pending {
                row: last.state,
                token: last.next,
                position: last.position,
                blocks,
            })
            .collect();
        self.network
            .fill_last(&mut self.scratch, &pending, &self.cache)
            .map_err(failed)
    }

    fn count_experts(&mut self, load: &ExpertLoad) -> Result<(), RunnerError> {
        self.network
            .take_expert_counts(&mut self.scratch, &mut |layer, counts| {
                load.add(layer, counts);
            })
            .map_err(failed)
    }
}

fn table(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|block| block.0).collect()
}

#[expect(clippy::needless_pass_by_value, reason = "what map_err hands over")]
fn failed(error: model::Error) -> RunnerError {
    RunnerError(error.to_string())
}
