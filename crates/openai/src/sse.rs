//! Server-sent events, as far as this API uses them: `data:` lines, comments, and a blank line after each event.
//!
//! [`event`] and its neighbours write into a buffer that goes to the socket in one piece; [`Decoder`] reads a stream
//! back, for clients and tests.

use std::io;

use serde::Serialize;

use crate::ApiError;

/// The last event of a stream that ended well.
pub const DONE: &[u8] = b"data: [DONE]\n\n";
/// What keeps a connection alive while a request waits. Clients skip it.
pub const COMMENT: &[u8] = b": queued\n\n";

/// Appends `value` as one event. JSON never holds a raw line break, so one `data:` line is enough.
pub fn event<W: io::Write>(out: &mut W, value: &impl Serialize) -> io::Result<()> {
    out.write_all(b"data: ")?;
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n\n")
}

/// Appends an error. Nothing follows it, least of all [`DONE`]: that is how a client knows the answer is not whole.
pub fn error<W: io::Write>(out: &mut W, error: &ApiError) -> io::Result<()> {
    out.write_all(b"data: ")?;
    out.write_all(error.to_json().as_bytes())?;
    out.write_all(b"\n\n")
}

/// Finds the events in a stream of bytes, however it is cut.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    line: Vec<u8>,
    data: Option<Vec<u8>>,
    after_return: bool,
}

impl Decoder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes more bytes and calls `found` with the data of each event that is complete.
    pub fn push(&mut self, bytes: &[u8], mut found: impl FnMut(&[u8])) {
        for &byte in bytes {
            let after_return = std::mem::replace(&mut self.after_return, byte == b'\r');
            match byte {
                // The second half of a line break that was counted already.
                b'\n' if after_return => {}
                b'\n' | b'\r' => self.end_line(&mut found),
                _ => self.line.push(byte),
            }
        }
    }

    fn end_line(&mut self, found: &mut impl FnMut(&[u8])) {
        if self.line.is_empty() {
            if let Some(data) = self.data.take() {
                found(&data);
            }
            return;
        }
        if let Some(value) = self.line.strip_prefix(b"data:") {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                None => self.data = Some(value.to_vec()),
            }
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(pieces: &[&[u8]]) -> Vec<String> {
        let (mut decoder, mut events) = (Decoder::new(), Vec::new());
        for piece in pieces {
            decoder.push(piece, |data| {
                events.push(String::from_utf8(data.to_vec()).unwrap());
            });
        }
        events
    }

    #[test]
    fn comments_other_fields_and_every_line_break_are_understood() {
        let stream =
            b": hello\n\nevent: x\ndata: a\n\ndata:b\r\n\r\ndata: c\rdata: d\r\rdata: unfinished";
        assert_eq!(decode(&[stream]), ["a", "b", "c\nd"]);
    }

    #[test]
    fn a_stream_ends_with_done_or_with_an_error() {
        let mut out = Vec::new();
        event(&mut out, &"x").unwrap();
        error(&mut out, &ApiError::internal("gone")).unwrap();
        let events = decode(&[&out]);
        assert_eq!(events[0], "\"x\"");
        assert!(events[1].starts_with(r#"{"error":{"message":"gone""#));
        assert_eq!(decode(&[COMMENT, DONE]), ["[DONE]"]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_however_it_is_cut(
            texts in prop::collection::vec(".{0,40}", 0..8),
            cut in 1_usize..17,
        ) {
            let mut out = Vec::new();
            for text in &texts {
                out.extend_from_slice(COMMENT);
                event(&mut out, text).unwrap();
            }
            let pieces: Vec<&[u8]> = out.chunks(cut).collect();
            let read: Vec<String> = decode(&pieces)
                .iter()
                .map(|json| serde_json::from_str(json).unwrap())
                .collect();
            prop_assert_eq!(read, texts);
        }

        #[test]
        fn a_decoder_never_panics(bytes: Vec<u8>) {
            Decoder::new().push(&bytes, |_| {});
        }
    }
}
