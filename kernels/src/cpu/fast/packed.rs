//! Weights in the order in which the fast product reads them.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use crate::backend::Result;
use crate::cpu::memory::{Arena, Memory};
use crate::cpu::simd::Isa;
use crate::cpu::weights::{Matrix, Values};
use crate::fp8;

/// Outputs that are computed together: two vectors.
pub(super) const PANEL: usize = 32;

/// Inputs whose products are summed before they join their block's.
pub(in crate::cpu) const CHUNK: usize = 32;

/// Element type of packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    Bf16,
    Fp8,
}

/// `[rows, cols]` weights as `[panel][col][32 rows]`, columns padded with zeros to a multiple of 32 and panels to 32 rows:
/// one load gives one input's weights for neighbouring outputs, and no sum crosses lanes. Rows of a panel share scales.
#[derive(Debug)]
pub(in crate::cpu) struct Packed {
    pub(in crate::cpu) rows: usize,
    pub(in crate::cpu) cols: usize,
    pub(super) form: Form,
    /// Whether `tile_products` may use them, on a processor with tiles.
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        expect(dead_code, reason = "no tiles there")
    )]
    pub(in crate::cpu) tiles: bool,
    data: Memory,
    /// Rows of each panel.
    panels: Vec<Range<usize>>,
    /// `[panel][ceil(cols / 128)]`; empty where weights have no scales.
    scales: Vec<f32>,
    /// `[panel][ceil(cols / 128)]`, for FP8: bit i says that all weights of the block's i-th pair of columns are normal
    /// numbers, which are brought to BF16 with less work.
    normal: Vec<u64>,
}

impl Packed {
    pub(in crate::cpu) fn new(matrix: &Matrix, isa: Isa, arena: &Arena) -> Result<Self> {
        let (rows, cols) = (matrix.rows, matrix.cols);
        let panels = split(rows, &matrix.scale_row);
        let len = panels.len() * cols.next_multiple_of(CHUNK) * PANEL;
        let (form, data) = match &matrix.values {
            Values::F32(values) => (
                Form::F32,
                pack(values, cols, &panels, arena.zeroed(4 * len)?, |i| i),
            ),
            // Two columns of the first 16 rows, words 2j and 2j + 1 of row j (`Simd::bf16_pair`), then of the others.
            Values::Bf16(values) => {
                let place = |i: usize| {
                    let (col, row) = (i / PANEL, i % PANEL);
                    col / 2 * 2 * PANEL + row / 16 * PANEL + row % 16 * 2 + col % 2
                };
                (
                    Form::Bf16,
                    pack::<bf16>(values, cols, &panels, arena.zeroed(2 * len)?, place),
                )
            }
            Values::Fp8(values) => {
                let mut order = [0; 64];
                for (j, natural) in isa.fp8_order().into_iter().enumerate() {
                    order[natural as usize] = j;
                }
                let place = |i| i / 64 * 64 + order[i % 64];
                (
                    Form::Fp8,
                    pack::<u8>(values, cols, &panels, arena.zeroed(len)?, place),
                )
            }
        };
        let tiles = isa.tiles() && cols > 0 && suits_tiles(&matrix.values);
        let (mut scales, mut normal) = (Vec::new(), Vec::new());
        if form == Form::Fp8 {
            for panel in &panels {
                let blocks = 0..cols.div_ceil(fp8::BLOCK);
                scales.extend(blocks.map(|block| matrix.scale(panel.start, block)));
            }
            let size = cols.next_multiple_of(CHUNK) * PANEL;
            let packed = data.slice::<u8>().chunks_exact(size.max(1));
            let blocks = packed.flat_map(|panel| panel.chunks(fp8::BLOCK * PANEL));
            normal.extend(blocks.map(normal_pairs));
        }
        Ok(Self {
            rows,
            cols,
            form,
            tiles,
            data,
            panels,
            scales,
            normal,
        })
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.panels.len()
    }

    /// Rows of a panel.
    pub(super) fn outputs(&self, panel: usize) -> Range<usize> {
        self.panels[panel].clone()
    }

    /// Columns with their padding.
    pub(super) fn padded(&self) -> usize {
        self.cols.next_multiple_of(CHUNK)
    }

    /// First byte of a panel.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        let bytes = self.data.bytes() / self.panels();
        &self.data.slice()[panel * bytes..][..bytes]
    }

    /// Scale of a panel's weights for 128 columns.
    pub(super) fn scale(&self, panel: usize, block: usize) -> f32 {
        match self.form {
            Form::Fp8 => self.scales[panel * self.cols.div_ceil(fp8::BLOCK) + block],
            _ => 1.0,
        }
    }

    /// Whether the pairs of columns of a block of 128 have normal numbers only: bit i for pair i; unknown where weights
    /// are not FP8.
    pub(super) fn normal(&self, panel: usize, block: usize) -> u64 {
        match self.form {
            Form::Fp8 => self.normal[panel * self.cols.div_ceil(fp8::BLOCK) + block],
            _ => 0,
        }
    }
}

/// Which pairs of columns of a packed block have normal numbers only.
fn normal_pairs(block: &[u8]) -> u64 {
    // No early end inside a pair, so that vectors do it.
    let all = |pair: &[u8]| pair.iter().fold(true, |all, b| all & fp8::is_normal(*b));
    let pairs = block.chunks_exact(2 * PANEL).enumerate();
    pairs.fold(0, |bits, (i, pair)| bits | u64::from(all(pair)) << i)
}

/// Whether tiles give these weights' products: FP8 without NaN, or BF16 without values so small that products with inputs
/// of 1e-12 and more, or sums of them, could be subnormal.
fn suits_tiles(values: &Values) -> bool {
    const SMALLEST: bf16 = bf16::from_bits(57 << 7); // 2^-70
    match values {
        Values::Fp8(values) => values.iter().all(|byte| byte & 0x7f != 0x7f),
        Values::Bf16(values) => values.iter().all(|v| {
            let magnitude = v.to_bits() & 0x7fff;
            magnitude == 0 || magnitude >= SMALLEST.to_bits()
        }),
        Values::F32(_) => false,
    }
}

/// Panels of at most 32 rows that use the same row of scales.
fn split(rows: usize, scale_row: &[u32]) -> Vec<Range<usize>> {
    let mut panels: Vec<Range<usize>> = Vec::new();
    for row in 0..rows {
        match panels.last_mut() {
            Some(panel)
                if panel.len() < PANEL && scale_row.get(panel.start) == scale_row.get(row) =>
            {
                panel.end = row + 1;
            }
            _ => panels.push(row..row + 1),
        }
    }
    panels
}

/// Puts value `[row, col]` to where `place` maps its natural index in the panel, `col * 32 + row`.
fn pack<T: Pod>(
    values: &[T],
    cols: usize,
    panels: &[Range<usize>],
    mut data: Memory,
    place: impl Fn(usize) -> usize,
) -> Memory {
    let packed = data.slice_mut::<T>();
    let size = packed.len() / panels.len().max(1);
    let packed = packed.chunks_exact_mut(size.max(1));
    for (packed, rows) in packed.zip(panels) {
        for (row, values) in values[rows.start * cols..rows.end * cols]
            .chunks_exact(cols.max(1))
            .enumerate()
        {
            for (col, value) in values.iter().enumerate() {
                packed[place(col * PANEL + row)] = *value;
            }
        }
    }
    data
}
