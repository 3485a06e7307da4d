//! How many tokens each logical expert has computed: cumulative, so that readers on any schedule lose nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens a logical expert and MoE layer since the engine started. Written by the engine's thread, read by anybody.
#[derive(Debug, Default)]
pub struct ExpertLoad {
    layers: Vec<usize>,
    experts: usize,
    /// `[layers, experts]`
    tokens: Vec<AtomicU64>,
}

impl ExpertLoad {
    /// Zero for `experts` experts in each of the given layers (their numbers in the network).
    pub fn new(layers: Vec<usize>, experts: usize) -> Self {
        let tokens = (0..layers.len() * experts)
            .map(|_| AtomicU64::new(0))
            .collect();
        Self {
            layers,
            experts,
            tokens,
        }
    }

    /// Numbers of the MoE layers, in the order of rows.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// Logical experts of a layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Adds a step's counts of layer number `layer`; layers that are not counted here are left out.
    pub fn add(&self, layer: usize, counts: &[u32]) {
        let Some(row) = self.layers.iter().position(|&counted| counted == layer) else {
            return;
        };
        for (total, &count) in self.tokens[row * self.experts..].iter().zip(counts) {
            if count > 0 {
                total.fetch_add(u64::from(count), Ordering::Relaxed);
            }
        }
    }

    /// The counts of one row so far.
    pub fn row(&self, row: usize) -> Vec<u64> {
        self.tokens[row * self.experts..(row + 1) * self.experts]
            .iter()
            .map(|tokens| tokens.load(Ordering::Relaxed))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_by_layer_and_expert() {
        let load = ExpertLoad::new(vec![3, 4], 3);
        load.add(3, &[1, 0, 2]);
        load.add(4, &[0, 5, 0]);
        load.add(3, &[1, 0, 0]);
        load.add(4, &[0, 0, 7]);
        load.add(9, &[1, 1, 1]);
        assert_eq!(load.row(0), [2, 0, 2]);
        assert_eq!(load.row(1), [0, 5, 7]);
    }
}
