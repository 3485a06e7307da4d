//! Bytes of tokens to text, as they come: a token may end in the middle of a character, and that part is held back.

/// Joins bytes to text. What never becomes a character turns into U+FFFD, one for each maximal broken piece: over a
/// whole sequence the text is what `String::from_utf8_lossy` makes of all its bytes.
#[derive(Clone, Debug, Default)]
pub struct Detokeniser {
    /// The beginning of a character: three bytes at most between calls.
    partial: Vec<u8>,
}

impl Detokeniser {
    /// With nothing held back.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends to `text` what became certain.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.partial.is_empty() {
            let rest = append_whole(bytes, text);
            self.partial.extend_from_slice(rest);
        } else {
            self.partial.extend_from_slice(bytes);
            let held = append_whole(&self.partial, text).len();
            self.partial.drain(..self.partial.len() - held);
        }
    }

    /// Bytes held back.
    pub fn held(&self) -> usize {
        self.partial.len()
    }

    /// Nothing more comes: an unfinished character is broken.
    pub fn finish(&mut self, text: &mut String) {
        if !self.partial.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
    }
}

/// Appends all of `bytes` but the beginning of a character at their end, which it returns.
fn append_whole<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(whole) => {
                text.push_str(whole);
                return &[];
            }
            Err(error) => {
                let (whole, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(whole).expect("valid up to here"));
                let Some(broken) = error.error_len() else {
                    return rest;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[broken..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_a_character_is_held_back() {
        let (mut detokeniser, mut text) = (Detokeniser::new(), String::new());
        let smile = "🙂".as_bytes();
        for (i, byte) in smile.iter().enumerate() {
            assert_eq!((text.as_str(), detokeniser.held()), ("", i));
            detokeniser.push(&[*byte], &mut text);
        }
        assert_eq!((text.as_str(), detokeniser.held()), ("🙂", 0));
    }

    proptest! {
        #[test]
        fn however_it_is_cut_the_text_is_that_of_all_bytes(
            pieces in prop::collection::vec(prop::collection::vec(
                prop_oneof![any::<u8>(), Just(0xe2), Just(0x82), Just(0xac), Just(0xf0), Just(0x9f)], 0..6), 0..12),
        ) {
            let (mut detokeniser, mut text) = (Detokeniser::new(), String::new());
            for piece in &pieces {
                detokeniser.push(piece, &mut text);
                prop_assert!(detokeniser.held() <= 3);
            }
            detokeniser.finish(&mut text);
            let whole = pieces.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }
    }
}
