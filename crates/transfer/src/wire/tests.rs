use proptest::prelude::*;
use proto::v1::{self, PushRequest, push_request::Message as Kind};

use super::*;

fn requests() -> Vec<PushRequest> {
    let piece = |block, payload: &[u8]| v1::Piece {
        block,
        first_layer: 300,
        layers: 1,
        tokens: 64,
        checksum: 0x0123_4567_89ab_cdef,
        payload: Bytes::copy_from_slice(payload),
    };
    let open = TransferOpen {
        receiver: "life".into(),
        lease: 7,
        ..TransferOpen::default()
    };
    [
        Kind::Open(open),
        Kind::Piece(piece(0, &[1; 200])),
        Kind::Piece(piece(70_000, &[2])),
        Kind::Seal(TransferSeal {
            checksum: 9,
            pieces: 2,
        }),
    ]
    .map(|message| PushRequest {
        message: Some(message),
    })
    .to_vec()
}

/// Reads a stream cut as given, with payload parts joined again.
fn read(parts: &[&[u8]]) -> Result<Vec<Event>, Error> {
    let mut reader = Reader::new(1 << 20);
    let mut events: Vec<Event> = Vec::new();
    for part in parts {
        reader.feed(Bytes::copy_from_slice(part));
        while let Some(event) = reader.read()? {
            match (events.last_mut(), event) {
                (Some(Event::Bytes(before, last @ false)), Event::Bytes(more, end)) => {
                    *before = [&before[..], &more[..]].concat().into();
                    *last = end;
                }
                (_, event) => events.push(event),
            }
        }
    }
    reader.finish()?;
    Ok(events)
}

fn expected() -> Vec<Event> {
    let mut events = Vec::new();
    for request in requests() {
        match request.message.unwrap() {
            Kind::Open(open) => events.push(Event::Open(open)),
            Kind::Seal(seal) => events.push(Event::Seal(seal)),
            Kind::Piece(piece) => {
                let v1::Piece {
                    block,
                    first_layer,
                    layers,
                    tokens,
                    checksum,
                    payload,
                } = piece;
                let header = Piece {
                    block,
                    first_layer,
                    layers,
                    tokens,
                };
                events.push(Event::Piece(header, checksum, payload.len()));
                events.push(Event::Bytes(payload, true));
            }
        }
    }
    events
}

#[test]
fn what_a_plain_peer_sends_is_read_however_it_is_cut() {
    let stream = requests().iter().flat_map(frame).collect::<Vec<u8>>();
    assert_eq!(read(&[&stream]).unwrap(), expected());
    for cut in 0..stream.len() {
        assert_eq!(
            read(&[&stream[..cut], &stream[cut..]]).unwrap(),
            expected(),
            "cut at {cut}"
        );
    }
    let bytes: Vec<&[u8]> = stream.chunks(1).collect();
    assert_eq!(read(&bytes).unwrap(), expected());
}

#[test]
fn a_hand_made_piece_is_what_a_plain_peer_reads() {
    let piece = Piece {
        block: 5,
        first_layer: 0,
        layers: 61,
        tokens: 64,
    };
    let mut stream = piece_head(&piece, 42, 1000).to_vec();
    stream.extend([7u8; 1000]);
    assert_eq!(stream[0], 0);
    assert_eq!(
        u32::from_be_bytes(stream[1..5].try_into().unwrap()) as usize,
        stream.len() - 5
    );
    let Some(Kind::Piece(read)) = PushRequest::decode(&stream[5..]).unwrap().message else {
        panic!("not a piece")
    };
    assert_eq!(
        (read.block, read.layers, read.tokens, read.checksum),
        (5, 61, 64, 42)
    );
    assert_eq!(read.payload, vec![7u8; 1000]);
}

#[test]
fn a_stream_that_ends_inside_a_message_is_truncated() {
    let stream = requests().iter().flat_map(frame).collect::<Vec<u8>>();
    let ends: Vec<usize> = requests()
        .iter()
        .scan(0, |end, request| {
            *end += frame(request).len();
            Some(*end)
        })
        .collect();
    for cut in 1..stream.len() {
        let result = read(&[&stream[..cut]]);
        if ends.contains(&cut) {
            assert!(result.is_ok());
        } else {
            assert_eq!(result.unwrap_err(), Error::Truncated, "cut at {cut}");
        }
    }
}

#[test]
fn limits_are_checked_before_anything_is_held() {
    let head = piece_head(
        &Piece {
            block: 0,
            first_layer: 0,
            layers: 1,
            tokens: 1,
        },
        0,
        2 << 20,
    );
    assert_eq!(read(&[&head]).unwrap_err(), Error::Length);
    assert_eq!(read(&[&[1, 0, 0, 0, 0]]).unwrap_err(), Error::Compressed);
    // An `open` of 200 KiB.
    let open = TransferOpen {
        receiver: "x".repeat(200 << 10),
        ..TransferOpen::default()
    };
    let open = frame(&PushRequest {
        message: Some(Kind::Open(open)),
    });
    assert_eq!(read(&[&open]).unwrap_err(), Error::Length);
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&[&bytes]);
    }

    #[test]
    fn a_changed_stream_is_an_error_or_other_events_but_never_a_panic(at in 0usize..500, to: u8) {
        let mut stream = requests().iter().flat_map(frame).collect::<Vec<u8>>();
        let at = at % stream.len();
        stream[at] = to;
        let _ = read(&[&stream]);
    }
}
