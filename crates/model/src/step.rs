//! What one step computes: its sequences, its limits, and the pure plan of who stands in which row.

use std::ops::Range;

use crate::error::{Error, Result};

/// Tokens of a KV block.
pub const BLOCK_TOKENS: usize = prefix::BLOCK_TOKENS;

/// The two ways to compute attention over the latent cache. Equal in exact arithmetic, not in rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Keys and values are made from the latents: less work for many new tokens.
    Expanded,
    /// Queries go into the latent space: less memory traffic for few new tokens.
    Absorbed,
}

/// Upper bounds, from which all memory of steps is planned once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// New tokens of a step, over all sequences.
    pub max_tokens: usize,
    /// Sequences of a step.
    pub max_sequences: usize,
    /// Tokens of a sequence, prompt and output together.
    pub max_context: usize,
    /// Longest context whose keys and values are expanded; longer ones are absorbed.
    pub max_expanded_context: usize,
    /// New prompt tokens from which the expanded form is worth it.
    pub expanded_from: usize,
    /// Sequences whose last state is kept for the MTP layer.
    pub max_states: usize,
    /// Whether the MTP layer is loaded and its KV filled.
    pub mtp: bool,
}

/// New prompt tokens from which the expanded form is cheaper, by published measurements.
pub const EXPANDED_FROM: usize = 256;

impl Limits {
    /// The form for a prompt of which `new_tokens` have to be computed, ending at `context` tokens.
    ///
    /// Choose once for a sequence's whole prompt, never from what else is in the batch or how the prompt is cut into
    /// chunks; tokens after the prompt are always [`Form::Absorbed`]. Then every token's bits depend on its own sequence
    /// alone: rows of a step do not see each other, and a chunk limit changes no sum within one form.
    pub fn form(&self, new_tokens: usize, context: usize) -> Form {
        if new_tokens >= self.expanded_from && context <= self.max_expanded_context {
            Form::Expanded
        } else {
            Form::Absorbed
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let least_one = [
            ("max_tokens", self.max_tokens),
            ("max_sequences", self.max_sequences),
            ("max_context", self.max_context),
        ];
        match least_one.iter().find(|(_, given)| *given == 0) {
            Some((name, _)) => Err(Error::Limits(format!("{name} is 0"))),
            None => Ok(()),
        }
    }
}

/// The new tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sequence<'a> {
    /// New tokens, at least one.
    pub tokens: &'a [u32],
    /// Position of the first of them: tokens whose KV is in the cache.
    pub first: usize,
    /// Blocks of the cache, enough for `first + tokens.len()` tokens.
    pub blocks: &'a [u32],
    /// How attention is computed, see [`Limits::form`].
    pub form: Form,
    /// Which of `tokens` want logits.
    pub logits: Range<usize>,
    /// Where the last token's state is kept for the MTP layer; `None`: no MTP entries for this sequence.
    pub state: Option<State>,
}

/// A row of kept states, given to a sequence by the caller for as long as it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// The row, below [`Limits::max_states`].
    pub row: usize,
    /// The row holds the state of token `first - 1`, so that token's MTP entry can be made now.
    pub previous: bool,
}

/// An MTP entry that only waited for its next token.
#[derive(Clone, Copy, Debug)]
pub struct Pending<'a> {
    /// Row of the kept state of the token at `position`.
    pub row: usize,
    /// The token after it.
    pub token: u32,
    /// Position of the state's token.
    pub position: usize,
    /// The sequence's blocks.
    pub blocks: &'a [u32],
}

/// Sequences that attention treats together.
#[derive(Debug, Default)]
pub(crate) struct Group {
    pub(crate) query_start: Vec<i32>,
    pub(crate) context_len: Vec<i32>,
    /// `[sequences, stride]`, filled up with zeros.
    pub(crate) block_table: Vec<i32>,
    pub(crate) max_query: usize,
    pub(crate) max_context: usize,
}

impl Group {
    pub(crate) fn count(&self) -> usize {
        self.context_len.len()
    }

    /// One past its last row.
    pub(crate) fn rows(&self) -> usize {
        self.query_start.last().map_or(0, |&end| end as usize)
    }

    fn clear(&mut self, first_row: usize) {
        self.query_start.clear();
        self.query_start.push(first_row as i32);
        self.context_len.clear();
        self.block_table.clear();
        (self.max_query, self.max_context) = (0, 0);
    }

    fn push(&mut self, sequence: &Sequence<'_>, end_row: usize, stride: usize) {
        let context = sequence.first + sequence.tokens.len();
        self.query_start.push(end_row as i32);
        self.context_len.push(context as i32);
        let used = &sequence.blocks[..context.div_ceil(BLOCK_TOKENS)];
        self.block_table
            .extend(used.iter().map(|&block| block as i32));
        self.block_table.resize(self.context_len.len() * stride, 0);
        self.max_query = self.max_query.max(sequence.tokens.len());
        self.max_context = self.max_context.max(context);
    }
}

/// Rows of the MTP layer's input.
#[derive(Debug, Default)]
pub(crate) struct MtpRows {
    /// Row of the state: a row of the step, or `max_tokens +` a kept row.
    pub(crate) states: Vec<i32>,
    /// The token after the state's.
    pub(crate) tokens: Vec<i32>,
    pub(crate) positions: Vec<i32>,
    pub(crate) slots: Vec<i32>,
}

impl MtpRows {
    pub(crate) fn rows(&self) -> usize {
        self.states.len()
    }

    fn clear(&mut self) {
        for list in [
            &mut self.states,
            &mut self.tokens,
            &mut self.positions,
            &mut self.slots,
        ] {
            list.clear();
        }
    }

    fn push(&mut self, state: usize, token: u32, position: usize, blocks: &[u32]) {
        self.states.push(state as i32);
        self.tokens.push(token as i32);
        self.positions.push(position as i32);
        self.slots.push(slot(blocks, position));
    }
}

/// Rows of a step: absorbed sequences first, then the expanded ones. Reused from step to step.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) tokens: Vec<i32>,
    pub(crate) positions: Vec<i32>,
    pub(crate) slots: Vec<i32>,
    pub(crate) absorbed: Group,
    /// One group a sequence; the first `expanded_count` are of this step.
    pub(crate) expanded: Vec<Group>,
    pub(crate) expanded_count: usize,
    /// Rows that want logits, in the order of the sequences given.
    pub(crate) logits: Vec<i32>,
    pub(crate) mtp: MtpRows,
    /// Rows whose state is kept, and where.
    pub(crate) keep_from: Vec<i32>,
    pub(crate) keep_to: Vec<i32>,
    /// Scratch: first row of each sequence given.
    first_rows: Vec<usize>,
}

/// What a plan needs to know of the network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) limits: Limits,
    pub(crate) vocab_size: usize,
    /// Blocks of the cache.
    pub(crate) blocks: usize,
}

impl Bounds {
    /// Most blocks of a sequence: the stride of block tables.
    pub(crate) fn stride(&self) -> usize {
        self.limits.max_context.div_ceil(BLOCK_TOKENS)
    }
}

fn slot(blocks: &[u32], position: usize) -> i32 {
    (blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS) as i32
}

impl Plan {
    /// Lays out a step.
    pub(crate) fn lay_out(&mut self, sequences: &[Sequence<'_>], bounds: &Bounds) -> Result<()> {
        check_step(sequences, bounds)?;
        self.clear(sequences.len());
        for form in [Form::Absorbed, Form::Expanded] {
            for (number, sequence) in sequences.iter().enumerate().filter(|(_, s)| s.form == form) {
                self.first_rows[number] = self.tokens.len();
                self.push(sequence, bounds);
            }
        }
        for (sequence, first_row) in sequences.iter().zip(&self.first_rows) {
            self.logits
                .extend(sequence.logits.clone().map(|i| (first_row + i) as i32));
        }
        Ok(())
    }

    fn push(&mut self, sequence: &Sequence<'_>, bounds: &Bounds) {
        let first_row = self.tokens.len();
        let end_row = first_row + sequence.tokens.len();
        self.tokens
            .extend(sequence.tokens.iter().map(|&token| token as i32));
        for position in sequence.first..sequence.first + sequence.tokens.len() {
            self.positions.push(position as i32);
            self.slots.push(slot(sequence.blocks, position));
        }
        match sequence.form {
            Form::Absorbed => self.absorbed.push(sequence, end_row, bounds.stride()),
            Form::Expanded => {
                if self.expanded.len() == self.expanded_count {
                    self.expanded.push(Group::default());
                }
                let group = &mut self.expanded[self.expanded_count];
                group.clear(first_row);
                group.push(sequence, end_row, bounds.stride());
                self.expanded_count += 1;
            }
        }
        if let Some(state) = sequence.state.filter(|_| bounds.limits.mtp) {
            self.push_mtp(sequence, state, first_row, bounds.limits.max_tokens);
        }
    }

    /// The MTP entry of a token needs the token after it: this step makes those from `first - 1` to the last but one.
    fn push_mtp(&mut self, sequence: &Sequence<'_>, state: State, first_row: usize, kept: usize) {
        if state.previous && sequence.first > 0 {
            let position = sequence.first - 1;
            self.mtp.push(
                kept + state.row,
                sequence.tokens[0],
                position,
                sequence.blocks,
            );
        }
        for (i, &next) in sequence.tokens.iter().enumerate().skip(1) {
            self.mtp.push(
                first_row + i - 1,
                next,
                sequence.first + i - 1,
                sequence.blocks,
            );
        }
        self.keep_from
            .push((first_row + sequence.tokens.len() - 1) as i32);
        self.keep_to.push((kept + state.row) as i32);
    }

    /// Lays out MTP entries alone, as rows of the MTP layer that want logits.
    pub(crate) fn lay_out_pending(
        &mut self,
        pending: &[Pending<'_>],
        bounds: &Bounds,
    ) -> Result<()> {
        if pending.len() > bounds.limits.max_sequences.min(bounds.limits.max_tokens) {
            return Err(Error::Step(format!(
                "{} pending entries are too many",
                pending.len()
            )));
        }
        self.clear(0);
        for (row, entry) in pending.iter().enumerate() {
            check_token(entry.token, bounds)?;
            check_blocks(entry.blocks, entry.position.saturating_add(1), bounds)?;
            check_row(entry.row, bounds)?;
            let alone = Sequence {
                tokens: &[entry.token],
                first: entry.position,
                blocks: entry.blocks,
                form: Form::Absorbed,
                logits: 0..1,
                state: None,
            };
            self.push(&alone, bounds);
            self.logits.push(row as i32);
            let state = bounds.limits.max_tokens + entry.row;
            self.mtp
                .push(state, entry.token, entry.position, entry.blocks);
        }
        Ok(())
    }

    fn clear(&mut self, sequences: usize) {
        for list in [
            &mut self.tokens,
            &mut self.positions,
            &mut self.slots,
            &mut self.logits,
            &mut self.keep_from,
            &mut self.keep_to,
        ] {
            list.clear();
        }
        self.mtp.clear();
        self.first_rows.clear();
        self.first_rows.resize(sequences, 0);
        self.absorbed.clear(0);
        self.expanded_count = 0;
    }
}

fn check_token(token: u32, bounds: &Bounds) -> Result<()> {
    if (token as usize) < bounds.vocab_size {
        return Ok(());
    }
    Err(Error::Step(format!(
        "token {token} is not below {}",
        bounds.vocab_size
    )))
}

fn check_row(row: usize, bounds: &Bounds) -> Result<()> {
    if row < bounds.limits.max_states {
        return Ok(());
    }
    Err(Error::Step(format!(
        "state row {row} is not below {}",
        bounds.limits.max_states
    )))
}

/// Blocks exist and reach to `context` tokens, which are not too many.
fn check_blocks(blocks: &[u32], context: usize, bounds: &Bounds) -> Result<()> {
    let max = bounds.limits.max_context;
    if context > max {
        return Err(Error::Step(format!("{context} tokens are more than {max}")));
    }
    if blocks.len() * BLOCK_TOKENS < context {
        let detail = format!("{} blocks do not hold {context} tokens", blocks.len());
        return Err(Error::Step(detail));
    }
    match blocks
        .iter()
        .find(|&&block| block as usize >= bounds.blocks)
    {
        Some(block) => Err(Error::Step(format!(
            "block {block} is not below {}",
            bounds.blocks
        ))),
        None => Ok(()),
    }
}

fn check_step(sequences: &[Sequence<'_>], bounds: &Bounds) -> Result<()> {
    let limits = &bounds.limits;
    if sequences.is_empty() || sequences.len() > limits.max_sequences {
        let detail = format!(
            "{} sequences, not 1..={}",
            sequences.len(),
            limits.max_sequences
        );
        return Err(Error::Step(detail));
    }
    let tokens: usize = sequences.iter().map(|sequence| sequence.tokens.len()).sum();
    if tokens > limits.max_tokens {
        return Err(Error::Step(format!(
            "{tokens} tokens are more than {}",
            limits.max_tokens
        )));
    }
    for sequence in sequences {
        let new = sequence.tokens.len();
        if new == 0 {
            return Err(Error::Step("a sequence has no new token".into()));
        }
        sequence
            .tokens
            .iter()
            .try_for_each(|&token| check_token(token, bounds))?;
        let context = sequence.first.saturating_add(new);
        check_blocks(sequence.blocks, context, bounds)?;
        if sequence.form == Form::Expanded && context > limits.max_expanded_context {
            let max = limits.max_expanded_context;
            return Err(Error::Step(format!(
                "{context} tokens are too many to expand ({max})"
            )));
        }
        if sequence.logits.start > sequence.logits.end || sequence.logits.end > new {
            let detail = format!("logits of {:?} of {new} tokens", sequence.logits);
            return Err(Error::Step(detail));
        }
        if let Some(state) = sequence.state {
            check_row(state.row, bounds)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
