//! Runs a fixture's network on the CPU in the ways a worker would.

use std::{collections::BTreeMap, sync::Arc};

use kernels::{Backend as _, BlockMemory as _, Cpu, DType, Precision};
use model::{Form, LayerDone, Limits, Network, Pending, Scratch, Sequence, State};

use crate::fixture::{Fixture, numbers};

pub(crate) struct Runner {
    pub(crate) network: Network<Cpu>,
    pub(crate) scratch: Scratch<Cpu>,
    cache: <Cpu as kernels::Backend>::Cache,
    /// Ids and weights of the last step, by layer.
    pub(crate) routing: BTreeMap<usize, (Vec<i32>, Vec<f32>)>,
}

impl Runner {
    pub(crate) fn new(fixture: &Fixture, precision: Precision) -> Self {
        Self::try_new(fixture, precision).unwrap()
    }

    pub(crate) fn try_new(fixture: &Fixture, precision: Precision) -> model::Result<Self> {
        let limits = Limits {
            max_tokens: 220,
            max_sequences: 4,
            max_context: 256,
            max_expanded_context: 256,
            expanded_from: model::EXPANDED_FROM,
            max_states: 4,
            mtp: true,
        };
        let backend = Arc::new(Cpu::new(2));
        let checkpoint = &fixture.checkpoint;
        let network = Network::load(backend, checkpoint, precision, limits, &mut |_| {})?;
        let (scratch, cache) = (network.scratch()?, network.cache(12)?);
        Ok(Self {
            network,
            scratch,
            cache,
            routing: BTreeMap::new(),
        })
    }

    fn forward(&mut self, sequences: &[Sequence<'_>]) -> Vec<f32> {
        let mut logits = Vec::new();
        let rows: usize = sequences.iter().map(|s| s.tokens.len()).sum();
        let (routing, mut layers) = (&mut self.routing, 0);
        routing.clear();
        let mut on_layer = |done: LayerDone<'_, Cpu>| {
            assert_eq!(done.layer, layers, "layers are reported in order");
            layers += 1;
            if let Some(choices) = done.routing {
                let count = rows * choices.experts.cols;
                let (mut ids, mut weights) = (vec![0i32; count], vec![0f32; count]);
                done.backend.download(
                    done.stream,
                    &choices.experts,
                    bytemuck::cast_slice_mut(&mut ids),
                )?;
                let bytes = bytemuck::cast_slice_mut(&mut weights);
                done.backend
                    .download(done.stream, &choices.weights, bytes)?;
                done.backend.synchronize(done.stream)?;
                routing.insert(done.layer, (ids, weights));
            }
            Ok(())
        };
        self.network
            .forward(
                &mut self.scratch,
                sequences,
                &self.cache,
                &mut on_layer,
                &mut logits,
            )
            .unwrap();
        assert_eq!(layers, self.network.kv_layers());
        logits
    }

    /// One sequence's new tokens, logits of all of them.
    pub(crate) fn step(
        &mut self,
        tokens: &[u32],
        first: usize,
        blocks: &[u32],
        form: Form,
    ) -> Vec<f32> {
        let state = Some(State {
            row: 1,
            previous: first > 0,
        });
        self.forward(&[Sequence {
            tokens,
            first,
            blocks,
            form,
            logits: 0..tokens.len(),
            state,
        }])
    }

    pub(crate) fn whole(&mut self, tokens: &[u32], form: Form) -> Vec<f32> {
        self.step(tokens, 0, &[0, 5, 3], form)
    }

    pub(crate) fn chunked(&mut self, tokens: &[u32], cuts: &[usize], form: Form) -> Vec<f32> {
        let (mut logits, mut first) = (Vec::new(), 0);
        for &end in cuts.iter().chain([&tokens.len()]) {
            logits.extend(self.step(&tokens[first..end], first, &[0, 5, 3], form));
            first = end;
        }
        logits
    }

    /// In one step with a sequence of each form before and after.
    pub(crate) fn beside_others(&mut self, tokens: &[u32], form: Form) -> Vec<f32> {
        let others: Vec<u32> = tokens.iter().rev().copied().take(40).collect();
        let other = |form, blocks| Sequence {
            tokens: &others,
            first: 0,
            blocks,
            form,
            logits: 0..0,
            state: None,
        };
        let sequence = Sequence {
            blocks: &[4, 2, 9],
            logits: 0..tokens.len(),
            ..other(form, &[])
        };
        let sequence = Sequence { tokens, ..sequence };
        self.forward(&[
            other(Form::Expanded, &[7]),
            sequence,
            other(Form::Absorbed, &[8]),
        ])
    }

    pub(crate) fn generate(&mut self, prompt: &[u32], count: usize) -> Vec<u32> {
        let vocab = self.network.config().vocab_size;
        let blocks = [0, 5, 3];
        let logits = self.step(prompt, 0, &blocks, Form::Expanded);
        let mut new = vec![greedy(&logits[logits.len() - vocab..])];
        while new.len() < count {
            let last = [new[new.len() - 1]];
            let logits = self.step(&last, prompt.len() + new.len() - 1, &blocks, Form::Absorbed);
            new.push(greedy(&logits));
        }
        new
    }

    /// Draft logits of the positions from 110 on, each from a prefix that ends there.
    pub(crate) fn drafts(&mut self, tokens: &[u32]) -> Vec<f32> {
        let (blocks, mut all, mut first) = ([0, 5, 3], Vec::new(), 0);
        for end in 111..tokens.len() {
            self.step(&tokens[first..end], first, &blocks, Form::Absorbed);
            first = end;
            let pending = Pending {
                row: 1,
                token: tokens[end],
                position: end - 1,
                blocks: &blocks,
            };
            let mut logits = Vec::new();
            self.network
                .draft(&mut self.scratch, &[pending], &self.cache, &mut logits)
                .unwrap();
            all.extend(logits);
        }
        all
    }

    /// Latents and rope keys of the first `tokens` tokens of blocks 0, 5 and 3, by layer.
    pub(crate) fn cache_entries(&self, tokens: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
        assert_eq!(
            self.network.cache_dtype(),
            DType::F32,
            "tests look into float32 caches only"
        );
        let sizes = &self.network.config().attention;
        let (layers, entry) = (self.network.kv_layers(), sizes.entry());
        let layer_bytes = self.cache.block_bytes() / layers;
        let read = |layer: usize| {
            let mut values: Vec<f32> = Vec::new();
            for block in [0, 5, 3] {
                let bytes = layer * layer_bytes..(layer + 1) * layer_bytes;
                let mut take = |b: &[u8]| values.extend(numbers::<f32>(b));
                self.cache.read(block, bytes, &mut take).unwrap();
            }
            let entries = || values.chunks(entry).take(tokens);
            let latent = entries()
                .flat_map(|e| e[..sizes.kv_lora_rank].to_vec())
                .collect();
            (
                latent,
                entries()
                    .flat_map(|e| e[sizes.kv_lora_rank..].to_vec())
                    .collect(),
            )
        };
        (0..layers).map(read).collect()
    }
}

/// The best token, the lowest of equals.
pub(crate) fn greedy(logits: &[f32]) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&logit| logit >= best).unwrap() as u32
}

pub(crate) fn close(a: &[f32], b: &[f32], line: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let far = a
        .iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(
        far <= line && a.iter().all(|v| v.is_finite()),
        "{what}: off by {far}"
    );
}
