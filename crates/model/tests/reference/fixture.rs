//! A committed checkpoint and what the judges say about it.

use std::{collections::HashMap, path::PathBuf};

use model::Checkpoint;
use safetensors::SafeTensors;

pub(crate) struct Fixture {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) tokens: Vec<u32>,
    expected: HashMap<String, Vec<u8>>,
}

impl Fixture {
    pub(crate) fn open(name: &str) -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let directory = root.join("../../tests/reference/fixtures").join(name);
        let file = std::fs::read(directory.join("expected.safetensors")).unwrap();
        let expected: HashMap<_, _> = SafeTensors::deserialize(&file)
            .unwrap()
            .tensors()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.data().to_vec()))
            .collect();
        let checkpoint = Checkpoint::open(&directory).unwrap();
        let mut fixture = Self {
            checkpoint,
            tokens: Vec::new(),
            expected,
        };
        fixture.tokens = fixture
            .i32("tokens")
            .iter()
            .map(|&token| token as u32)
            .collect();
        fixture
    }

    pub(crate) fn f32(&self, name: &str) -> Vec<f32> {
        numbers(&self.expected[name])
    }

    pub(crate) fn i32(&self, name: &str) -> Vec<i32> {
        numbers(&self.expected[name])
    }
}

/// Little-endian numbers, wherever they lie.
pub(crate) fn numbers<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes
        .chunks_exact(size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .collect()
}
