//! The bytes of `KvTransfer.Push` without a codec: the same gRPC frames and protobuf fields that any peer sends, but the
//! payload of a piece is never copied into a message. [`piece_head`] writes what stands before a payload; [`Reader`]
//! takes the stream apart as it arrives.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint},
};
use proto::v1::{TransferOpen, TransferSeal};

use crate::geometry::Piece;

/// Field numbers of `PushRequest` and `Piece` (transfer.proto).
mod field {
    pub(super) const OPEN: u32 = 1;
    pub(super) const PIECE: u32 = 2;
    pub(super) const SEAL: u32 = 3;
    pub(super) const BLOCK: u32 = 1;
    pub(super) const FIRST_LAYER: u32 = 2;
    pub(super) const LAYERS: u32 = 3;
    pub(super) const TOKENS: u32 = 4;
    pub(super) const CHECKSUM: u32 = 5;
    pub(super) const PAYLOAD: u32 = 6;
}

/// Bytes of `open` and `seal` at most.
const MAX_SMALL: usize = 64 * 1024;
/// Bytes of the gRPC prefix: a compression flag and a big-endian length.
const PREFIX: usize = 5;
/// Bytes of a key and a length at most.
const MAX_KEY: usize = 20;

/// A stream that is not what transfer.proto says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Compressed messages are refused: KV does not compress, bombs do.
    #[error("compressed messages are not taken")]
    Compressed,
    /// A message or field is longer than the message around it, or than the limit.
    #[error("a message is too long or its lengths do not fit")]
    Length,
    /// Not a protobuf field of this message.
    #[error("a malformed message")]
    Malformed,
    /// `payload` has to be the last field of a piece.
    #[error("the payload is not the last field of its piece")]
    PayloadNotLast,
    /// The stream ended inside a message.
    #[error("the stream ended inside a message")]
    Truncated,
}

/// gRPC prefix, keys and header of a piece: `payload_bytes` of payload follow it on the wire.
pub fn piece_head(piece: &Piece, checksum: u64, payload_bytes: usize) -> Bytes {
    let mut header = BytesMut::with_capacity(96);
    for (number, value) in [
        (field::BLOCK, piece.block),
        (field::FIRST_LAYER, piece.first_layer),
        (field::LAYERS, piece.layers),
        (field::TOKENS, piece.tokens),
    ] {
        encode_key(number, WireType::Varint, &mut header);
        encode_varint(u64::from(value), &mut header);
    }
    encode_key(field::CHECKSUM, WireType::SixtyFourBit, &mut header);
    header.put_u64_le(checksum);
    encode_key(field::PAYLOAD, WireType::LengthDelimited, &mut header);
    encode_varint(payload_bytes as u64, &mut header);

    let piece_bytes = header.len() + payload_bytes;
    let message_bytes = 1 + encoded_len_varint(piece_bytes as u64) + piece_bytes;
    let mut head = BytesMut::with_capacity(PREFIX + 11 + header.len());
    head.put_u8(0);
    head.put_u32(message_bytes as u32);
    encode_key(field::PIECE, WireType::LengthDelimited, &mut head);
    encode_varint(piece_bytes as u64, &mut head);
    head.put(header);
    head.freeze()
}

/// A whole message with its gRPC prefix.
pub fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(PREFIX + len);
    out.put_u8(0);
    out.put_u32(len as u32);
    message
        .encode(&mut out)
        .expect("the buffer grows as needed");
    out.freeze()
}

/// What a stream says, in order. A piece is `Piece`, then `Bytes` until its payload is complete.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// `PushRequest.open`.
    Open(TransferOpen),
    /// The header of `PushRequest.piece`: its checksum and the bytes of payload that follow.
    Piece(Piece, u64, usize),
    /// Some bytes of the payload; `true` with the last ones.
    Bytes(Bytes, bool),
    /// `PushRequest.seal`.
    Seal(TransferSeal),
}

#[derive(Debug)]
enum State {
    Prefix,
    /// Inside a message of which `left` bytes are unread: the key and length of what it carries.
    Key {
        left: usize,
    },
    /// `open` (or `seal`) of `len` bytes.
    Small {
        open: bool,
        len: usize,
    },
    Header {
        left: usize,
        piece: Piece,
        checksum: u64,
    },
    Payload {
        left: usize,
    },
}

/// Takes a stream apart, however it is cut into frames.
#[derive(Debug)]
pub struct Reader {
    max_payload: usize,
    state: State,
    /// The start of something that is not complete yet (never payload).
    held: BytesMut,
    data: Bytes,
}

impl Reader {
    /// At the start of a stream whose payloads have at most `max_payload` bytes.
    pub fn new(max_payload: usize) -> Self {
        Self {
            max_payload,
            state: State::Prefix,
            held: BytesMut::new(),
            data: Bytes::new(),
        }
    }

    /// Gives it the next bytes. Call [`Reader::read`] until it is empty first.
    pub fn feed(&mut self, data: Bytes) {
        debug_assert!(self.data.is_empty(), "the bytes before are not read");
        self.data = data;
    }

    /// Whether the stream may end here.
    pub fn finish(&self) -> Result<(), Error> {
        let between = matches!(self.state, State::Prefix) && self.held.is_empty();
        if between {
            Ok(())
        } else {
            Err(Error::Truncated)
        }
    }

    /// The next thing the stream says; `None`: more bytes are needed.
    pub fn read(&mut self) -> Result<Option<Event>, Error> {
        loop {
            match self.state {
                State::Prefix => {
                    if !self.hold(PREFIX) {
                        return Ok(None);
                    }
                    let mut prefix = self.held.split();
                    if prefix.get_u8() != 0 {
                        return Err(Error::Compressed);
                    }
                    let left = prefix.get_u32() as usize;
                    if left > self.max_payload + MAX_SMALL {
                        return Err(Error::Length);
                    }
                    self.state = State::Key { left };
                }
                State::Key { left } => {
                    let Some((number, len, used)) = self.delimited(left)? else {
                        return Ok(None);
                    };
                    // One field a message: the oneof.
                    if len != left - used {
                        return Err(Error::Length);
                    }
                    self.state = match number {
                        field::PIECE => {
                            let piece = Piece {
                                block: 0,
                                first_layer: 0,
                                layers: 0,
                                tokens: 0,
                            };
                            State::Header {
                                left: len,
                                piece,
                                checksum: 0,
                            }
                        }
                        field::OPEN | field::SEAL if len > MAX_SMALL => return Err(Error::Length),
                        field::OPEN => State::Small { open: true, len },
                        field::SEAL => State::Small { open: false, len },
                        _ => return Err(Error::Malformed),
                    };
                }
                State::Small { open, len } => {
                    if !self.hold(len) {
                        return Ok(None);
                    }
                    let message = self.held.split();
                    self.state = State::Prefix;
                    return Ok(Some(if open {
                        Event::Open(TransferOpen::decode(message).map_err(|_| Error::Malformed)?)
                    } else {
                        Event::Seal(TransferSeal::decode(message).map_err(|_| Error::Malformed)?)
                    }));
                }
                State::Header {
                    left,
                    mut piece,
                    mut checksum,
                } => {
                    if left == 0 {
                        // A piece without a payload carries nothing.
                        return Err(Error::Malformed);
                    }
                    let Some((field, used)) = self.header_field(left)? else {
                        return Ok(None);
                    };
                    match field {
                        HeaderField::Number(number, value) => {
                            let value = u32::try_from(value).map_err(|_| Error::Malformed)?;
                            match number {
                                field::BLOCK => piece.block = value,
                                field::FIRST_LAYER => piece.first_layer = value,
                                field::LAYERS => piece.layers = value,
                                field::TOKENS => piece.tokens = value,
                                _ => return Err(Error::Malformed),
                            }
                        }
                        HeaderField::Checksum(value) => checksum = value,
                        HeaderField::Payload(len) => {
                            if len != left - used {
                                return Err(Error::PayloadNotLast);
                            }
                            if len == 0 || len > self.max_payload {
                                return Err(Error::Length);
                            }
                            self.state = State::Payload { left: len };
                            return Ok(Some(Event::Piece(piece, checksum, len)));
                        }
                    }
                    self.state = State::Header {
                        left: left - used,
                        piece,
                        checksum,
                    };
                }
                State::Payload { left } => {
                    if self.data.is_empty() {
                        return Ok(None);
                    }
                    let part = self.data.split_to(left.min(self.data.len()));
                    let left = left - part.len();
                    self.state = if left == 0 {
                        State::Prefix
                    } else {
                        State::Payload { left }
                    };
                    return Ok(Some(Event::Bytes(part, left == 0)));
                }
            }
        }
    }

    /// Collects until `len` bytes are held.
    fn hold(&mut self, len: usize) -> bool {
        let take = len.saturating_sub(self.held.len()).min(self.data.len());
        self.held.extend_from_slice(&self.data.split_to(take));
        self.held.len() >= len
    }

    /// Collects bytes one by one until `parse` takes them (`None`: more are needed).
    fn collect<T>(
        &mut self,
        limit: usize,
        parse: impl Fn(&mut &[u8]) -> Result<Option<T>, Error>,
    ) -> Result<Option<(T, usize)>, Error> {
        loop {
            if !self.held.is_empty()
                && let Some(value) = parse(&mut &self.held[..])?
            {
                let used = self.held.len();
                self.held.clear();
                return Ok(Some((value, used)));
            }
            if self.held.len() >= limit.min(MAX_KEY) {
                return Err(Error::Length);
            }
            if self.data.is_empty() {
                return Ok(None);
            }
            let held = self.held.len();
            self.hold(held + 1);
        }
    }

    /// Key and length of a length-delimited field, and the bytes they took.
    fn delimited(&mut self, limit: usize) -> Result<Option<(u32, usize, usize)>, Error> {
        let found = self.collect(limit, |bytes| {
            let Some((number, wire)) = key(bytes)? else {
                return Ok(None);
            };
            if wire != WireType::LengthDelimited as u64 {
                return Err(Error::Malformed);
            }
            Ok(varint(bytes)?.map(|len| (number, len)))
        })?;
        let Some(((number, len), used)) = found else {
            return Ok(None);
        };
        let len = usize::try_from(len).map_err(|_| Error::Length)?;
        Ok(Some((number, len, used)))
    }

    fn header_field(&mut self, limit: usize) -> Result<Option<(HeaderField, usize)>, Error> {
        self.collect(limit, |bytes| {
            let Some((number, wire)) = key(bytes)? else {
                return Ok(None);
            };
            match number {
                field::CHECKSUM if wire == WireType::SixtyFourBit as u64 => {
                    Ok((bytes.len() >= 8).then(|| HeaderField::Checksum(bytes.get_u64_le())))
                }
                field::PAYLOAD if wire == WireType::LengthDelimited as u64 => {
                    let Some(len) = varint(bytes)? else {
                        return Ok(None);
                    };
                    let len = usize::try_from(len).map_err(|_| Error::Length)?;
                    Ok(Some(HeaderField::Payload(len)))
                }
                _ if wire == WireType::Varint as u64 => {
                    Ok(varint(bytes)?.map(|value| HeaderField::Number(number, value)))
                }
                _ => Err(Error::Malformed),
            }
        })
    }
}

enum HeaderField {
    Number(u32, u64),
    Checksum(u64),
    Payload(usize),
}

fn key(bytes: &mut &[u8]) -> Result<Option<(u32, u64)>, Error> {
    let Some(key) = varint(bytes)? else {
        return Ok(None);
    };
    let number = u32::try_from(key >> 3).map_err(|_| Error::Malformed)?;
    Ok(Some((number, key & 7)))
}

/// A varint of at most ten bytes; `None`: it is not complete.
fn varint(bytes: &mut &[u8]) -> Result<Option<u64>, Error> {
    let mut value = 0u64;
    for i in 0..10 {
        let Some((byte, rest)) = bytes.split_first() else {
            return Ok(None);
        };
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(Some(value));
        }
    }
    Err(Error::Malformed)
}

#[cfg(test)]
mod tests;
