//! Ten thousand ways to damage a transfer on the wire; none may seal.

use bytes::Bytes;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use prost::Message as _;
use proto::v1::{self, PushRequest, push_request::Message};

use super::*;
use crate::{
    Piece, ReceiveError, checksum,
    wire::{Event, Reader, frame},
};

/// A receiver without a network.
fn receiver() -> (Arc<Memory>, crate::Receiver<Blocks>, Arc<AtomicUsize>) {
    let memory = Memory::new(16, GEOMETRY.block_bytes(), |_, _| 0);
    let settings = Settings::new("life-1".into(), FINGERPRINT.to_vec(), GEOMETRY);
    let receiver = crate::Receiver::new(settings, Arc::clone(&memory) as _, Arc::new(Quiet));
    (memory, receiver, Arc::default())
}

fn identity(lease: u64) -> Identity {
    Identity {
        key: key(),
        lease,
        receiver: "life-1".into(),
        sender: "sender-life".into(),
        fingerprint: FINGERPRINT.to_vec(),
        plan: plan(),
    }
}

fn byte(salt: usize, block: u32, i: usize) -> u8 {
    (block as usize * 89 + i * 7 + i / 251 + salt * 31) as u8
}

/// The pieces of a transfer of `identity` over contents chosen by `salt`, and its seal.
fn pieces(identity: &Identity, salt: usize) -> Vec<PushRequest> {
    let mut sending = crate::protocol::Sending::new(identity.plan, identity.seed());
    let mut filled = Watermarks::new(GEOMETRY.layers);
    filled.raise(0..3, 20);
    assert!(sending.opened(&[0; 3]));
    let mut messages = vec![];
    loop {
        let message = match sending.next(&filled, 2 * GEOMETRY.layer_bytes()) {
            crate::protocol::Next::Piece(piece) => {
                let payload: Vec<u8> = piece
                    .range(&GEOMETRY)
                    .map(|i| byte(salt, piece.block, i))
                    .collect();
                let sums: Vec<u64> = payload
                    .chunks(piece.layer_bytes(&GEOMETRY))
                    .map(checksum::layer)
                    .collect();
                let checksum = sending.sent(&piece, &sums);
                let Piece {
                    block,
                    first_layer,
                    layers,
                    tokens,
                } = piece;
                let payload = Bytes::from(payload);
                Message::Piece(v1::Piece {
                    block,
                    first_layer,
                    layers,
                    tokens,
                    checksum,
                    payload,
                })
            }
            crate::protocol::Next::Seal(checksum) => {
                let seal = v1::TransferSeal {
                    checksum,
                    pieces: 0,
                };
                messages.push(PushRequest {
                    message: Some(Message::Seal(seal)),
                });
                return messages;
            }
            crate::protocol::Next::Wait => unreachable!("everything is filled"),
        };
        messages.push(PushRequest {
            message: Some(message),
        });
    }
}

/// Feeds a stream to a session as the server does. `Ok(true)`: it was sealed.
fn feed(session: &mut crate::Session<Blocks>, stream: &[u8]) -> Result<bool, ReceiveError> {
    let mut reader = Reader::new(1 << 16);
    reader.feed(Bytes::copy_from_slice(stream));
    loop {
        let Ok(event) = reader.read() else {
            return Ok(false);
        };
        match event {
            None | Some(Event::Open(_)) => return Ok(false),
            Some(Event::Piece(piece, checksum, bytes)) => session.piece(piece, checksum, bytes)?,
            Some(Event::Bytes(data, last)) => drop(session.bytes(&data, last)?),
            Some(Event::Seal(seal)) => {
                session.seal(seal.checksum)?;
                return Ok(true);
            }
        }
    }
}

/// How a stream is damaged.
#[derive(Clone, Debug)]
enum Damage {
    /// One bit of what follows the opening.
    Flip(usize),
    /// A run of bytes is replaced.
    Overwrite(usize, Vec<u8>),
    /// Bytes are lost.
    Cut(usize, usize),
    /// The payloads of two pieces change places.
    SwapPayloads(usize, usize),
    /// The headers of two pieces change places, checksums stay with the payloads.
    SwapHeaders(usize, usize),
    /// A piece of another transfer: other request, attempt, lease, life, sender, format or size.
    Replay(usize, usize),
    /// A piece says it is another layer, block or token count.
    Relabel(usize, u32, u32, u32),
    /// A piece is missing.
    Drop(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = 0usize..100_000;
    prop_oneof![
        8 => at.clone().prop_map(Damage::Flip),
        3 => (at.clone(), proptest::collection::vec(any::<u8>(), 1..24))
            .prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        2 => (at.clone(), 1usize..200).prop_map(|(at, len)| Damage::Cut(at, len)),
        1 => (0usize..7, 0usize..7).prop_map(|(a, b)| Damage::SwapPayloads(a, b)),
        1 => (0usize..7, 0usize..7).prop_map(|(a, b)| Damage::SwapHeaders(a, b)),
        2 => (0usize..7, 0usize..7).prop_map(|(at, of)| Damage::Replay(at, of)),
        2 => (0usize..7, 0u32..4, 0u32..4, 0u32..9)
            .prop_map(|(at, block, layer, tokens)| Damage::Relabel(at, block, layer, tokens)),
        1 => (0usize..7).prop_map(Damage::Drop),
    ]
}

/// The same transfer, but for one part of its identity.
fn relative(identity: &Identity, of: usize) -> Identity {
    let mut other = identity.clone();
    match of {
        0 => other.key.request = "request-2".into(),
        1 => other.key.attempt += 1,
        2 => other.lease += 1,
        3 => other.receiver = "life-0".into(),
        4 => other.sender = "sender-before".into(),
        5 => other.fingerprint = b"f32/3/8/4".to_vec(),
        // Nothing but the bytes differ: the same piece of an earlier prompt.
        _ => return other,
    }
    other
}

/// The damaged stream; `None` if the damage changed nothing.
fn damaged(identity: &Identity, how: &Damage) -> Option<Vec<u8>> {
    let good = pieces(identity, 0);
    let count = good.len() - 1;
    let mut messages = good.clone();
    let piece = |message: &PushRequest| match &message.message {
        Some(Message::Piece(piece)) => piece.clone(),
        _ => panic!("not a piece"),
    };
    let put = |piece| PushRequest {
        message: Some(Message::Piece(piece)),
    };
    let join = |messages: &[PushRequest]| -> Vec<u8> { messages.iter().flat_map(frame).collect() };
    match *how {
        Damage::SwapPayloads(a, b) | Damage::SwapHeaders(a, b) => {
            let (a, b) = (a % count, b % count);
            let (mut first, mut second) = (piece(&messages[a]), piece(&messages[b]));
            std::mem::swap(&mut first.payload, &mut second.payload);
            if matches!(how, Damage::SwapHeaders(..)) {
                std::mem::swap(&mut first.checksum, &mut second.checksum);
            }
            messages[a] = put(first);
            messages[b] = put(second);
        }
        Damage::Replay(at, of) => {
            let of = of % 7;
            let salt = usize::from(of == 6);
            messages[at % count] = pieces(&relative(identity, of), salt)[at % count].clone();
            if of == 6 {
                // A piece of an earlier prompt under this very identity has a right checksum of its own: the seal
                // has to notice.
                assert_ne!(messages[at % count], good[at % count]);
            }
        }
        Damage::Relabel(at, block, first_layer, tokens) => {
            let mut piece = piece(&messages[at % count]);
            (piece.block, piece.first_layer, piece.tokens) = (block, first_layer, tokens);
            messages[at % count] = put(piece);
        }
        Damage::Drop(at) => drop(messages.remove(at % count)),
        Damage::Flip(_) | Damage::Overwrite(..) | Damage::Cut(..) => {}
    }
    let mut stream = join(&messages);
    let len = stream.len();
    match how {
        Damage::Flip(at) => stream[at % len] ^= 1 << (at / len % 8),
        Damage::Overwrite(at, bytes) => {
            let at = at % len;
            let end = len.min(at + bytes.len());
            stream[at..end].copy_from_slice(&bytes[..end - at]);
        }
        Damage::Cut(at, cut) => {
            let at = at % len;
            drop(stream.drain(at..len.min(at + cut)));
        }
        _ => {}
    }
    (stream != join(&good)).then_some(stream)
}

/// Whether the bytes in the receiver's blocks are those that were sent.
fn is_right(memory: &Memory) -> bool {
    let plan = plan();
    plan.blocks().all(|block| {
        let received = memory.bytes(THERE[block as usize]);
        let valid = plan.tokens(block) as usize * GEOMETRY.token_bytes as usize;
        (0..GEOMETRY.block_bytes())
            .filter(|i| i % GEOMETRY.layer_bytes() < valid)
            .all(|i| received[i] == byte(0, block, i))
    })
}

fn deliver(how: Option<&Damage>) -> (bool, bool, usize) {
    let (memory, receiver, out) = receiver();
    let blocks = Blocks::take(THERE.to_vec(), &out);
    let lease = receiver.reserve(key(), plan(), TTL, blocks).unwrap();
    let identity = identity(lease);
    let stream = match how {
        None => pieces(&identity, 0).iter().flat_map(frame).collect(),
        Some(how) => match damaged(&identity, how) {
            Some(stream) => stream,
            None => return (false, true, 0),
        },
    };
    let mut session = receiver.session();
    let open = session.open(&identity);
    futures::FutureExt::now_or_never(open)
        .expect("nobody writes")
        .unwrap();
    let sealed = feed(&mut session, &stream).unwrap_or(false);
    let right = is_right(&memory);
    drop(session);
    receiver.release(lease);
    (sealed, right, out.load(Ordering::SeqCst))
}

#[test]
fn an_undamaged_stream_seals() {
    assert_eq!(deliver(None), (true, true, 0));
}

#[test]
fn ten_thousand_damaged_streams_never_seal_wrong_bytes() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let config = Config {
        cases: 10_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut harmless = 0;
    let mut runner = TestRunner::new(config);
    let harmless_counter = std::cell::Cell::new(0);
    runner
        .run(&damage(), |how| {
            let (sealed, right, left) = deliver(Some(&how));
            prop_assert_eq!(left, 0, "blocks did not come back");
            // Some damage means nothing (an unused field of the seal): then the bytes have to be right.
            prop_assert!(!sealed || right, "wrong bytes passed");
            harmless_counter.set(harmless_counter.get() + u32::from(sealed));
            Ok(())
        })
        .unwrap();
    harmless += harmless_counter.get();
    assert!(
        harmless < 500,
        "{harmless} of 10,000 did nothing: the damage is too mild"
    );
}

#[test]
fn an_opening_that_was_changed_is_refused() {
    let (_, receiver, out) = receiver();
    let blocks = Blocks::take(THERE.to_vec(), &out);
    let lease = receiver.reserve(key(), plan(), TTL, blocks).unwrap();
    let good = identity(lease).to_open().encode_to_vec();
    let mut survived = vec![];
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let Ok(open) = v1::TransferOpen::decode(&bytes[..]) else {
            continue;
        };
        let Some(changed) = Identity::from_open(open, &GEOMETRY) else {
            continue;
        };
        let mut session = receiver.session();
        if futures::FutureExt::now_or_never(session.open(&changed))
            .expect("nobody writes")
            .is_ok()
        {
            survived.push(changed);
        }
    }
    // The first sender binds the lease, so its name may be any; then every piece's checksum tells.
    let senders: Vec<_> = survived
        .iter()
        .map(|identity| identity.sender.clone())
        .collect();
    assert!(
        survived
            .iter()
            .all(|changed| changed.seed() != identity(lease).seed()),
        "{senders:?}"
    );
    assert!(receiver.release(lease));
}
