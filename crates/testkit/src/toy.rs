//! A network whose tokens are a pure function of the sequence, kept in a KV cache that it checks.
//!
//! The KV of a token holds its layer, its position, the token and a hash chained over all tokens before it, and the next
//! token is drawn from that hash as it stands *in the cache*. Before every step the whole context is compared with what
//! it must be. So a block that was moved wrongly, reused too early or found under a wrong hash is reported as a
//! violation, and, as in real life, changes the answer.

use std::{ops::Range, sync::Arc};

use engine::{
    ExpertLoad, Runner,
    runner::{Facts, Last, Row, RunnerError, StepHeader},
};
use kernels::{BlockMemory, DType};
use kv::{BLOCK_TOKENS, BlockId, HostMemory, KvFormat};
use tokio::sync::mpsc;

/// Words of 8 bytes that a token's KV has in one layer.
const WORDS: usize = 4;

/// How a toy network is made.
#[derive(Clone, Debug)]
pub struct ToyConfig {
    /// Networks of different seeds say different things.
    pub seed: u64,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// KV layers; the last is a draft layer, whose entry for a token holds the token after it.
    pub layers: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Rows of a step.
    pub max_rows: usize,
    /// Tokens of a step.
    pub max_step_tokens: usize,
    /// Part of hashes and fingerprint.
    pub revision: String,
    /// A sequence whose last token this is gets logits that are not numbers.
    pub poison_token: Option<u32>,
}

impl Default for ToyConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            vocab_size: 300,
            layers: 3,
            blocks: 64,
            max_model_len: 2048,
            max_rows: 16,
            max_step_tokens: 512,
            revision: "toy".into(),
            poison_token: None,
        }
    }
}

impl ToyConfig {
    /// The format of its blocks.
    pub fn format(&self) -> KvFormat {
        KvFormat {
            revision: self.revision.clone(),
            layers: self.layers,
            latent: 6,
            rope: 2,
            dtype: DType::F32,
        }
    }

    /// What the network says after `tokens`, greedily.
    pub fn greedy(&self, tokens: &[u32], count: usize) -> Vec<u32> {
        let mut chain = tokens.iter().fold(self.start(), |chain, &t| step(chain, t));
        (0..count)
            .map(|_| {
                let logits = self.logits(chain);
                let best = (0..logits.len())
                    .fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
                chain = step(chain, best as u32);
                best as u32
            })
            .collect()
    }

    /// The logits after `tokens`.
    pub fn logits_after(&self, tokens: &[u32]) -> Vec<f32> {
        self.logits(tokens.iter().fold(self.start(), |chain, &t| step(chain, t)))
    }

    fn start(&self) -> u64 {
        mix(self.seed)
    }

    fn logits(&self, chain: u64) -> Vec<f32> {
        (0..self.vocab_size as u64)
            .map(|token| (mix(chain ^ mix(token)) >> 51) as f32 / 1024.0)
            .collect()
    }

    /// What one layer holds of one token.
    fn entry(&self, layer: usize, position: usize, token: u32, chain: u64) -> [u8; WORDS * 8] {
        let place = (layer as u64) << 32 | position as u64;
        let words = [
            place,
            u64::from(token),
            chain,
            mix(place ^ chain ^ self.seed),
        ];
        let mut bytes = [0; WORDS * 8];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

fn step(chain: u64, token: u32) -> u64 {
    mix(chain ^ mix(u64::from(token) + 1))
}

/// See the module documentation.
#[derive(Debug)]
pub struct Toy {
    config: ToyConfig,
    facts: Facts,
    memory: Arc<HostMemory>,
    /// Hash of the last token of the sequence with this state.
    states: Vec<u64>,
    counts: Vec<u32>,
    violations: mpsc::UnboundedSender<String>,
}

impl Toy {
    /// A network and the channel of its violations.
    pub fn new(config: ToyConfig) -> (Self, mpsc::UnboundedReceiver<String>) {
        let (violations, receiver) = mpsc::unbounded_channel();
        let format = config.format();
        let facts = Facts {
            vocab_size: config.vocab_size,
            max_model_len: config.max_model_len,
            max_rows: config.max_rows,
            max_step_tokens: config.max_step_tokens,
            draft_layer: true,
            prompts_differ: false,
            moe_layers: vec![1],
            experts: 8,
            format: format.clone(),
        };
        let toy = Self {
            memory: Arc::new(HostMemory::new(config.blocks, format.block_bytes())),
            states: vec![0; config.max_rows],
            counts: vec![0; facts.experts],
            config,
            facts,
            violations,
        };
        (toy, receiver)
    }

    fn draft_layer(&self) -> usize {
        self.config.layers - 1
    }

    fn span(&self, layer: usize, slot: usize) -> Range<usize> {
        let row = self.facts.format.row_bytes();
        let first = layer * self.facts.format.layer_bytes() + slot * row;
        first..first + row
    }

    fn write(
        &self,
        blocks: &[BlockId],
        layer: usize,
        position: usize,
        token: u32,
        chain: u64,
    ) -> Result<(), RunnerError> {
        let entry = self.config.entry(layer, position, token, chain);
        let span = self.span(layer, position % BLOCK_TOKENS);
        let block = blocks[position / BLOCK_TOKENS].index();
        self.memory
            .write(block, span, &mut |bytes| bytes.copy_from_slice(&entry))
            .map_err(|e| RunnerError(e.to_string()))
    }

    fn read(
        &self,
        blocks: &[BlockId],
        layer: usize,
        position: usize,
    ) -> Result<[u8; WORDS * 8], RunnerError> {
        let span = self.span(layer, position % BLOCK_TOKENS);
        let block = blocks[position / BLOCK_TOKENS].index();
        let mut entry = [0; WORDS * 8];
        self.memory
            .read(block, span, &mut |bytes| entry.copy_from_slice(bytes))
            .map_err(|e| RunnerError(e.to_string()))?;
        Ok(entry)
    }

    /// Compares the context of a row with what it must be; returns the hash of its last token as the cache has it.
    fn context(&self, row: &Row<'_>) -> Result<u64, RunnerError> {
        let mut expected = self.config.start();
        let mut found = expected;
        for position in 0..row.first {
            let token = row.tokens[position];
            expected = step(expected, token);
            for layer in 0..self.draft_layer() {
                let entry = self.read(row.blocks, layer, position)?;
                self.compare(row, layer, position, &entry, token, expected);
                let mut chain = [0; 8];
                chain.copy_from_slice(&entry[16..24]);
                found = u64::from_le_bytes(chain);
            }
            // The last entry of the context may lag; that of a shared block's last token was made for another sequence.
            let next = position + 1;
            if next < row.first && next % BLOCK_TOKENS != 0 {
                let layer = self.draft_layer();
                let entry = self.read(row.blocks, layer, position)?;
                self.compare(row, layer, position, &entry, row.tokens[next], expected);
            }
        }
        Ok(found)
    }

    fn compare(
        &self,
        row: &Row<'_>,
        layer: usize,
        position: usize,
        entry: &[u8],
        token: u32,
        chain: u64,
    ) {
        if entry != self.config.entry(layer, position, token, chain) {
            let block = row.blocks[position / BLOCK_TOKENS];
            // Nobody listening is a test that does not look.
            let _ = self.violations.send(format!(
                "wrong KV: layer {layer}, position {position} in {block:?}: {entry:02x?}"
            ));
        }
    }
}

impl Runner for Toy {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn memory(&self) -> Arc<dyn BlockMemory> {
        Arc::<HostMemory>::clone(&self.memory)
    }

    fn forward(
        &mut self,
        header: &StepHeader,
        rows: &[Row<'_>],
        on_layer: &mut dyn FnMut(usize) -> Result<(), RunnerError>,
        logits: &mut Vec<f32>,
    ) -> Result<(), RunnerError> {
        assert!(header.rows <= self.facts.max_rows && header.tokens <= self.facts.max_step_tokens);
        // chains[r][i]: hash of the row's token `first - 1 + i`.
        let mut chains = Vec::new();
        for row in rows {
            let mut chain = self.context(row)?;
            let mut row_chains = vec![chain];
            for &token in row.new_tokens() {
                chain = step(chain, token);
                self.counts[(chain % 8) as usize] += 1;
                row_chains.push(chain);
            }
            chains.push(row_chains);
        }
        for layer in 0..self.draft_layer() {
            for (row, chains) in rows.iter().zip(&chains) {
                for (i, position) in (row.first..row.tokens.len()).enumerate() {
                    self.write(
                        row.blocks,
                        layer,
                        position,
                        row.tokens[position],
                        chains[i + 1],
                    )?;
                }
            }
            on_layer(layer)?;
        }
        let layer = self.draft_layer();
        for (row, chains) in rows.iter().zip(&chains) {
            if row.continues {
                let (position, next) = (row.first - 1, row.tokens[row.first]);
                self.write(row.blocks, layer, position, next, self.states[row.state])?;
            }
            for (i, position) in (row.first..row.tokens.len() - 1).enumerate() {
                let next = row.tokens[position + 1];
                self.write(row.blocks, layer, position, next, chains[i + 1])?;
            }
            self.states[row.state] = chains[chains.len() - 1];
        }
        on_layer(layer)?;
        logits.clear();
        for (row, chains) in rows.iter().zip(&chains) {
            for position in row.logits.clone() {
                logits.extend(self.config.logits(chains[position - row.first + 1]));
                if self.config.poison_token == Some(row.tokens[position]) {
                    logits.pop();
                    logits.push(f32::NAN);
                }
            }
        }
        Ok(())
    }

    fn fill_last(&mut self, last: &[Last<'_>]) -> Result<(), RunnerError> {
        for last in last {
            let chain = self.states[last.state];
            self.write(
                last.blocks,
                self.draft_layer(),
                last.position,
                last.next,
                chain,
            )?;
        }
        Ok(())
    }

    fn count_experts(&mut self, load: &ExpertLoad) -> Result<(), RunnerError> {
        load.add(self.facts.moe_layers[0], &self.counts);
        self.counts.fill(0);
        Ok(())
    }
}
