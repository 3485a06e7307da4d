//! Server-sent events, read from bytes that arrive in pieces of any size.

use bytes::{Buf, Bytes, BytesMut};

/// Longest event that is kept: a server that never ends one must not fill the memory.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// The event that did not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent an event of more than {MAX_EVENT_BYTES} bytes")]
pub(crate) struct TooLong;

/// Collects bytes and gives the `data` of each whole event.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    buffer: BytesMut,
    data: Vec<u8>,
    has_data: bool,
}

impl Parser {
    /// Adds what arrived.
    ///
    /// # Errors
    /// When an unfinished event grows beyond all measure.
    pub(crate) fn push(&mut self, bytes: &Bytes) -> Result<(), TooLong> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() + self.data.len() > MAX_EVENT_BYTES {
            Err(TooLong)
        } else {
            Ok(())
        }
    }

    /// The data of the next whole event; lines of comments and fields other than `data` are dropped.
    pub(crate) fn next_data(&mut self) -> Option<String> {
        while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
            let line = self.buffer.split_to(end);
            self.buffer.advance(1);
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            if line.is_empty() {
                if std::mem::take(&mut self.has_data) {
                    let data = std::mem::take(&mut self.data);
                    return Some(String::from_utf8_lossy(&data).into_owned());
                }
            } else if let Some(value) = line.strip_prefix(b"data:") {
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.has_data = true;
                self.data
                    .extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = Parser::default();
        let mut events = Vec::new();
        for piece in pieces {
            parser.push(&Bytes::copy_from_slice(piece)).unwrap();
            while let Some(data) = parser.next_data() {
                events.push(data);
            }
        }
        events
    }

    #[test]
    fn comments_and_other_fields_are_dropped() {
        let stream = b": waiting\n\nevent: x\nid: 1\ndata: {\"a\":1}\n\ndata:[DONE]\r\n\r\n";
        assert_eq!(read(&[stream]), ["{\"a\":1}", "[DONE]"]);
    }

    #[test]
    fn several_data_lines_make_one_event() {
        assert_eq!(read(&[b"data: a\ndata:\ndata: b\n\n"]), ["a\n\nb"]);
    }

    proptest! {
        #[test]
        fn cuts_between_pieces_change_nothing(cuts in prop::collection::vec(0usize..64, 0..6)) {
            let stream: &[u8] = "data: \u{e4}\u{1f40b}\n\n: c\r\ndata: two\r\ndata: lines\n\ndata: [DONE]\n\n".as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
            prop_assert_eq!(read(&pieces), ["\u{e4}\u{1f40b}", "two\nlines", "[DONE]"]);
        }
    }
}
