//! One sequence's tokens to the text that a client sees: detokenised, cut at stop strings, with the log probabilities
//! of exactly the tokens that are in it.

use std::collections::VecDeque;

use crate::{Detokeniser, Found, StopStrings, Tokenizer};

/// Turns tokens into text as they come.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    detokeniser: Detokeniser,
    stops: StopStrings,
    /// Text of the token at hand; empty between calls.
    fresh: String,
    /// Bytes of text that came out of the detokeniser.
    decoded: usize,
    /// Bytes of text that were released.
    released: usize,
    /// Log probabilities of tokens whose text is held back.
    held: VecDeque<Held>,
}

/// A token's log probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The token.
    pub token: u32,
    /// Its own.
    pub logprob: f32,
    /// Those of the most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What became certain: more text, and the tokens that came with it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// More text.
    pub text: String,
    /// Log probabilities, where they were asked for.
    pub entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Held {
    start: usize,
    end: usize,
    entry: Entry,
}

impl Answer {
    /// An empty answer that ends at any of `stops`.
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops: StopStrings::new(stops),
            ..Self::default()
        }
    }

    /// Takes a token and adds to `piece` what can be released. After [`Found::Stop`] nothing more may come.
    pub fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        entry: Option<Entry>,
        piece: &mut Piece,
    ) -> Found {
        let start = self.decoded;
        self.detokeniser
            .push(tokenizer.text_bytes(token), &mut self.fresh);
        self.decoded += self.fresh.len();
        if let Some(entry) = entry {
            self.held.push_back(Held {
                start,
                end: self.decoded,
                entry,
            });
        }
        let before = piece.text.len();
        let found = self.stops.push(&self.fresh, &mut piece.text);
        self.fresh.clear();
        self.released += piece.text.len() - before;
        if found == Found::Stop {
            let cut = self.released;
            let inside = self.held.drain(..).filter(|held| held.start < cut);
            piece.entries.extend(inside.map(|held| held.entry));
        } else {
            let released = self.released;
            while self.held.front().is_some_and(|held| held.end <= released) {
                piece
                    .entries
                    .extend(self.held.pop_front().map(|held| held.entry));
            }
        }
        found
    }

    /// The sequence ended by itself: adds to `piece` what was held back. A stop string can still be completed by the
    /// U+FFFD that an unfinished character becomes.
    pub fn finish(&mut self, piece: &mut Piece) -> Found {
        self.detokeniser.finish(&mut self.fresh);
        let found = self.stops.push(&self.fresh, &mut piece.text);
        self.fresh.clear();
        if found == Found::Nothing {
            self.stops.finish(&mut piece.text);
        }
        piece
            .entries
            .extend(self.held.drain(..).map(|held| held.entry));
        found
    }
}
