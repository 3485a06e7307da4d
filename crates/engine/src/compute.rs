//! One step's work: run the network over the slices, choose tokens, tell the readers.

use std::ops::Range;

use kernels::BlockMemory;
use kv::{BLOCK_TOKENS, complete_blocks};

use crate::{
    api::{Error, Event, Finish},
    core::Core,
    runner::{Facts, Last, Row, Runner, RunnerError, StepHeader},
    sampler::{self, BadLogits, Sampler},
    schedule::Slice,
    sequence::{Held, Sequence},
};

impl<R: Runner> Core<R> {
    /// Computes the slices and ends sequences that are done.
    ///
    /// # Errors
    /// If the network failed: no sequence of the step has ended then, and none of them can go on.
    pub(crate) fn compute(&mut self, slices: &[Slice]) -> Result<(), RunnerError> {
        self.forward(slices)?;
        let vocab = self.facts.vocab_size;
        let lag = usize::from(self.facts.draft_layer);
        let mut rows = self.logits.chunks_exact(vocab);
        let mut ended = Vec::new();
        let mut leaving = Vec::new();
        for &Slice { index, tokens } in slices {
            let sequence = &mut self.running[index];
            let wanted = wanted_logits(sequence, tokens).len();
            let rows: Vec<&[f32]> = rows.by_ref().take(wanted).collect();
            sequence.computed += tokens;
            sequence.continues = true;
            let before = sequence.generated();
            let outcome = advance(
                sequence,
                tokens,
                &rows,
                self.limits.max_model_len,
                &mut self.sampler,
            );
            self.counters.computed_tokens += tokens as u64;
            self.counters.generated_tokens += (sequence.generated() - before) as u64;
            match outcome {
                Ok(None) => {}
                Ok(Some(Finish::HandOff)) => leaving.push(index),
                Ok(Some(finish)) => ended.push((index, Event::Finished(finish))),
                Err(bad) => {
                    // The KV behind such logits must not be found again.
                    if let (BadLogits::NotANumber, Some(held)) = (bad, &sequence.held) {
                        held.blocks().withdraw();
                    }
                    ended.push((index, Event::Failed(Error::Network(bad.to_string()))));
                    continue;
                }
            }
            sequence.publish(sequence.computed - lag, self.facts.prompts_differ);
        }
        self.runner.count_experts(&self.experts)?;
        self.complete_drafts(&leaving)?;
        ended.extend(
            leaving
                .into_iter()
                .map(|i| (i, Event::Finished(Finish::HandOff))),
        );
        ended.sort_unstable_by_key(|(i, _)| *i);
        for (i, event) in ended.into_iter().rev() {
            self.end(i, event);
        }
        Ok(())
    }

    fn forward(&mut self, slices: &[Slice]) -> Result<(), RunnerError> {
        let running = &self.running;
        let row = |&Slice { index, tokens }: &Slice| {
            let sequence = &running[index];
            let first = sequence.computed;
            Row {
                tokens: &sequence.tokens[..first + tokens],
                first,
                prompt: first < sequence.prompt_tokens,
                blocks: sequence.block_ids(),
                logits: wanted_logits(sequence, tokens),
                state: sequence.state.expect("what runs has a state"),
                continues: sequence.continues,
            }
        };
        let rows: Vec<Row<'_>> = slices.iter().map(row).collect();
        let header = StepHeader {
            step: self.counters.steps,
            rows: rows.len(),
            tokens: slices.iter().map(|slice| slice.tokens).sum(),
        };
        let lagging = self.facts.lagging_layer();
        let mut on_layer = |layer: usize| {
            for &Slice { index, tokens } in slices {
                let sequence = &running[index];
                let (mut first, mut end) = (sequence.computed, sequence.computed + tokens);
                if lagging == Some(layer) {
                    first -= usize::from(sequence.continues);
                    end -= 1;
                }
                filled(sequence, layer, first..end, &self.facts, &*self.memory)?;
            }
            Ok(())
        };
        self.runner
            .forward(&header, &rows, &mut on_layer, &mut self.logits)
    }

    /// Completes the draft entries of sequences that go on elsewhere: their first token is known now.
    fn complete_drafts(&mut self, leaving: &[usize]) -> Result<(), RunnerError> {
        let Some(layer) = self.facts.lagging_layer() else {
            return Ok(());
        };
        if leaving.is_empty() {
            return Ok(());
        }
        let last = |&i: &usize| {
            let sequence = &self.running[i];
            Last {
                state: sequence.state.expect("what runs has a state"),
                next: sequence.tokens[sequence.computed],
                position: sequence.computed - 1,
                blocks: sequence.block_ids(),
            }
        };
        let last: Vec<Last<'_>> = leaving.iter().map(last).collect();
        self.runner.fill_last(&last)?;
        for &i in leaving {
            let sequence = &mut self.running[i];
            let end = sequence.computed;
            filled(sequence, layer, end - 1..end, &self.facts, &*self.memory)?;
            sequence.publish(end, self.facts.prompts_differ);
        }
        Ok(())
    }
}

/// Positions among the next `tokens` tokens of a sequence whose logits are wanted: the last of all, or every one.
fn wanted_logits(sequence: &Sequence, tokens: usize) -> Range<usize> {
    let end = sequence.computed + tokens;
    if sequence.prompt_logprobs.is_some() {
        sequence.computed..end
    } else {
        end - usize::from(end == sequence.tokens.len())..end
    }
}

/// Uses the logits of the `tokens` tokens just computed: chooses the next token where they reach the end, tells the
/// reader, and returns how the sequence ended if it did.
fn advance(
    sequence: &mut Sequence,
    tokens: usize,
    rows: &[&[f32]],
    max_model_len: usize,
    sampler: &mut Sampler,
) -> Result<Option<Finish>, BadLogits> {
    collect_prompt_logprobs(sequence, sequence.computed - tokens, rows)?;
    if sequence.uncomputed() > 0 {
        return Ok(None);
    }
    if let Some(logprobs) = sequence.prompt_logprobs.take() {
        sequence.sink.send(Event::PromptLogprobs(logprobs));
    }
    let index = sequence.generated();
    if index >= sequence.stop.max_tokens {
        return Ok(Some(Finish::Length));
    }
    let logits = rows.last().expect("the last token wants logits");
    let Sequence {
        sampling,
        stop,
        history,
        ..
    } = &*sequence;
    let token = sampler.choose(logits, sampling, stop, history, index)?;
    let chosen = token.token;
    sequence.push(chosen);
    sequence.sink.send(Event::Token(token));
    let full =
        sequence.generated() >= sequence.stop.max_tokens || sequence.tokens.len() >= max_model_len;
    Ok(if sequence.stop.tokens.contains(&chosen) {
        Some(Finish::Stop)
    } else if full {
        Some(Finish::Length)
    } else {
        sequence.leaves_after.map(|_| Finish::HandOff)
    })
}

/// Row `i` holds the distribution of the token after position `first + i`.
fn collect_prompt_logprobs(
    sequence: &mut Sequence,
    first: usize,
    rows: &[&[f32]],
) -> Result<(), BadLogits> {
    let Some(logprobs) = &mut sequence.prompt_logprobs else {
        return Ok(());
    };
    let top = sequence.sampling.top_logprobs.unwrap_or(0);
    for (row, position) in rows.iter().zip(first + 1..sequence.prompt_tokens) {
        sampler::check(row)?;
        let token = sequence.tokens[position];
        logprobs.push(sampler::report(row, token, position, Some(top)));
    }
    Ok(())
}

/// Tells that a layer has the KV of these tokens of a sequence that goes on elsewhere, and stores the checksums of blocks
/// that are complete with it, while their bytes are warm.
fn filled(
    sequence: &Sequence,
    layer: usize,
    tokens: Range<usize>,
    facts: &Facts,
    memory: &dyn BlockMemory,
) -> Result<(), RunnerError> {
    let (Some(Held::Lent(blocks)), Some(total)) = (&sequence.held, sequence.leaves_after) else {
        return Ok(());
    };
    if tokens.is_empty() {
        return Ok(());
    }
    for block in complete_blocks(tokens.start, tokens.end, total) {
        let rows = BLOCK_TOKENS.min(total - block * BLOCK_TOKENS);
        blocks
            .pool()
            .sum_rows(memory, &facts.format, blocks.ids()[block], layer, rows)
            .map_err(|e| RunnerError(e.to_string()))?;
    }
    sequence.sink.send(Event::Filled {
        first: tokens.start,
        end: tokens.end,
        layers: layer..layer + 1,
    });
    Ok(())
}
