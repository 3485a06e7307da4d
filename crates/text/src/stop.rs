//! Stop strings over token boundaries: text is held back as long as it could be the beginning of one.

/// Looks for stop strings in text that comes in pieces. Where the text is cut does not depend on the pieces: an answer
/// ends at the first character that completes a stop string, and is cut at the beginning of the longest one there.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

/// Whether an answer goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No stop string yet.
    Nothing,
    /// One was found: the text before it was released, the rest is dropped.
    Stop,
}

impl StopStrings {
    /// Looks for `stops`, none of which may be empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(
            stops.iter().all(|stop| !stop.is_empty()),
            "an empty stop string matches anything"
        );
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes more text and appends to `out` what can be released.
    pub fn push(&mut self, text: &str, out: &mut String) -> Found {
        if self.stops.is_empty() {
            out.push_str(text);
            return Found::Nothing;
        }
        self.held.push_str(text);
        if let Some(start) = self.first_stop() {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return Found::Stop;
        }
        let keep = self.open_end();
        out.push_str(&self.held[..self.held.len() - keep]);
        self.held.drain(..self.held.len() - keep);
        Found::Nothing
    }

    /// Bytes held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// The answer ended otherwise: what was held back belongs to it.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Where the stop string that is completed first begins.
    fn first_stop(&self) -> Option<usize> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        found.min().map(|(_, start)| start)
    }

    /// Length of the longest end of the held text that is the beginning of a stop string.
    fn open_end(&self) -> usize {
        let longest = |stop: &String| {
            let most = self.held.len().min(stop.len() - 1);
            let is_open = |length: &usize| {
                self.held.as_bytes()[self.held.len() - length..] == stop.as_bytes()[..*length]
            };
            (1..=most).rev().find(is_open).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Character by character over the whole text.
    fn naive(stops: &[String], text: &str) -> (String, Found) {
        for (at, c) in text.char_indices() {
            let seen = &text[..at + c.len_utf8()];
            let ended = stops.iter().filter(|stop| seen.ends_with(stop.as_str()));
            if let Some(longest) = ended.map(String::len).max() {
                return (seen[..seen.len() - longest].into(), Found::Stop);
            }
        }
        (text.into(), Found::Nothing)
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut stops = StopStrings::new(vec!["\n\nUser:".into()]);
        let mut out = String::new();
        assert_eq!(stops.push("one\n", &mut out), Found::Nothing);
        assert_eq!((out.as_str(), stops.held()), ("one", 1));
        assert_eq!(stops.push("two\n\nUse", &mut out), Found::Nothing);
        assert_eq!(out, "one\ntwo");
        assert_eq!(stops.push("r: three", &mut out), Found::Stop);
        assert_eq!(out, "one\ntwo");
    }

    #[test]
    fn an_end_that_was_not_a_stop_string_is_given_back() {
        let mut stops = StopStrings::new(vec!["END".into()]);
        let mut out = String::new();
        stops.push("the EN", &mut out);
        assert_eq!(out, "the ");
        stops.finish(&mut out);
        assert_eq!(out, "the EN");
    }

    proptest! {
        #[test]
        fn however_it_is_cut_the_result_is_the_naive_search_s(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,5}", 0..10),
        ) {
            let expected = naive(&stops, &pieces.concat());
            let mut search = StopStrings::new(stops);
            let (mut out, mut found) = (String::new(), Found::Nothing);
            for piece in &pieces {
                found = search.push(piece, &mut out);
                if found == Found::Stop {
                    break;
                }
            }
            if found == Found::Nothing {
                search.finish(&mut out);
            }
            prop_assert_eq!((out, found), expected);
        }
    }
}
