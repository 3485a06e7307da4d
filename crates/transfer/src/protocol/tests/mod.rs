//! The receiver's whole state space over a small transfer, and the sender against a model receiver.

mod receiver;
mod sender;

use crate::geometry::{Geometry, Piece, Plan};

/// One block of two layers: enough for holes, resumption and overlap.
fn plan() -> Plan {
    let geometry = Geometry {
        layers: 2,
        block_tokens: 4,
        token_bytes: 1,
    };
    Plan {
        geometry,
        first_block: 0,
        total_tokens: 4,
    }
}

/// The checksum of a part's true bytes.
fn truth(layer: u32) -> u64 {
    u64::from(layer) + 100
}

const PIECES: [Piece; 3] = [
    Piece {
        block: 0,
        first_layer: 0,
        layers: 1,
        tokens: 4,
    },
    Piece {
        block: 0,
        first_layer: 1,
        layers: 1,
        tokens: 4,
    },
    Piece {
        block: 0,
        first_layer: 0,
        layers: 2,
        tokens: 4,
    },
];
