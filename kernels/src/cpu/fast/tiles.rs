//! The product with AMX tiles: FP8 and BF16 weights with inputs that are BF16 values, to the bits of `product`.
//!
//! A task takes some rows and some panels. It brings its rows' inputs to tiles once, then, panel by panel, a block of
//! 128 inputs' weights to tiles, and multiplies the two.

use std::arch::x86_64::{
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::cell::RefCell;
use std::ops::Range;

use super::packed::{Form, PANEL, Packed};
use super::product::{Part, Row};
use crate::cpu::pool::Pool;
use crate::cpu::simd::amx::{self, Source, Tiles};
use crate::fp8;

/// Most rows of a task.
const ROWS: usize = 192;

/// Bytes of a task's inputs that leave room in the second-level cache.
const INPUT_BYTES: usize = 1 << 20;

/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 18;

/// Panels that are worth bringing rows to tiles for.
const PANELS: usize = 8;

thread_local! {
    /// Room for a task's input tiles.
    static INPUTS: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

/// A row of a tile.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Tile(#[expect(dead_code, reason = "read through pointers")] [u8; amx::ROW]);

/// Computes all parts of `rows`.
///
/// # Safety
/// The processor has AMX. Every row's inputs (exact in BF16), scales and outputs are good for its part's weights, those
/// are for tiles, and nothing else touches the outputs.
pub(in crate::cpu) unsafe fn tile_products<T: Source>(
    pool: &mut Pool,
    rows: &[Row<T>],
    parts: &[Part<'_>],
) {
    let mut tasks = Vec::new();
    let mut work = 0;
    for part in parts {
        let (weight, panels) = (part.weight, part.weight.panels());
        let most = (INPUT_BYTES / (2 * weight.padded()).max(1)).clamp(32, ROWS);
        let count = part.rows.len();
        let step = count
            .div_ceil(count.div_ceil(most).max(1))
            .next_multiple_of(2 * amx::ROWS);
        for start in part.rows.clone().step_by(step.max(1)) {
            let rows = &rows[start..part.rows.end.min(start + step)];
            let panel_work = rows.len() * weight.cols * PANEL;
            work += panel_work * panels;
            let few =
                (TASK / panel_work.max(1)).max(PANELS.min(panels.div_ceil(2 * pool.threads())));
            let step = few.clamp(1, panels.max(1));
            tasks.extend((0..panels).step_by(step).map(|first| Product {
                weight,
                panels: first..panels.min(first + step),
                rows,
            }));
        }
    }
    pool.run(tasks.len(), work < 2 * TASK, &|i| {
        // SAFETY: the caller's; tasks differ in rows or panels, so their outputs are disjoint.
        unsafe { tasks[i].run() };
    });
}

struct Product<'a, T> {
    weight: &'a Packed,
    panels: Range<usize>,
    rows: &'a [Row<T>],
}

/// A block's weight tiles, its products, and totals.
#[repr(align(64))]
struct Scratch {
    weights: [u8; fp8::BLOCK * PANEL * 2],
    products: [f32; 4 * amx::ROWS * amx::ROWS],
    totals: [f32; ROWS * PANEL],
}

impl<T: Source> Product<'_, T> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    unsafe fn run(&self) {
        let mut scratch = std::mem::MaybeUninit::<Scratch>::uninit();
        let scratch = scratch.as_mut_ptr();
        // Tiles have as few rows as fit all rows in as few tiles as possible.
        let tiles = self.rows.len().div_ceil(amx::ROWS);
        let height = self.rows.len().div_ceil(tiles);
        let chunks = self.weight.padded() / amx::INPUTS;
        INPUTS.with_borrow_mut(|inputs| {
            let len = tiles * height * chunks;
            if inputs.len() < len {
                inputs.resize(len, Tile([0; amx::ROW]));
            }
            // SAFETY: the caller's; `len` tile rows are what `inputs` and `panel` use, and every field of the scratch is
            // written before it is read.
            unsafe {
                let (inputs, totals) = (
                    inputs.as_mut_ptr().cast::<u8>(),
                    (&raw mut (*scratch).totals).cast::<f32>(),
                );
                self.inputs(height, inputs);
                let unit = Tiles::new(height);
                for panel in self.panels.clone() {
                    self.panel(panel, &unit, height, inputs, scratch);
                    let outputs = self.weight.outputs(panel);
                    for (i, row) in self.rows.iter().enumerate() {
                        let (from, to) = (totals.add(i * PANEL), row.out.add(outputs.start));
                        if outputs.len() == PANEL {
                            to.cast::<[f32; PANEL]>()
                                .write_unaligned(from.cast::<[f32; PANEL]>().read());
                        } else {
                            to.copy_from_nonoverlapping(from, outputs.len());
                        }
                    }
                }
            }
        });
    }

    /// Where the inputs' tiles of a pair begin, how many tiles it has, all in rows of tiles: pairs of tiles of `height`
    /// rows are `[pair][chunk][tile][row]`, the last pair may be one tile.
    fn pair(&self, pair: usize, height: usize) -> (usize, usize) {
        let chunks = self.weight.padded() / amx::INPUTS;
        let first = 2 * pair * height;
        let tiles = (self.rows.len() - first).div_ceil(height).min(2);
        (first * chunks, tiles)
    }

    /// Brings the rows' inputs to tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn inputs(&self, height: usize, to: *mut u8) {
        let cols = self.weight.cols;
        for (i, row) in self.rows.iter().enumerate() {
            let (first, tiles) = self.pair(i / (2 * height), height);
            let at = |chunk: usize| {
                let line = first + chunk * tiles * height + i % (2 * height);
                to.wrapping_add(line * amx::ROW)
            };
            for col in (0..cols).step_by(2 * amx::INPUTS) {
                let (n, chunk) = ((cols - col).min(2 * amx::INPUTS), col / amx::INPUTS);
                // SAFETY: the row has these values; `to` has both chunks where there are more than 32.
                unsafe { T::sixty_four(row.x.add(col), n, at(chunk), at(chunk + 1)) };
            }
        }
    }

    /// Adds every block's products of the rows with a panel to the totals.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    unsafe fn panel(
        &self,
        panel: usize,
        unit: &Tiles,
        height: usize,
        inputs: *const u8,
        scratch: *mut Scratch,
    ) {
        let padded = self.weight.padded();
        let packed = self.weight.panel(panel).as_ptr();
        let size = height * amx::ROW;
        // SAFETY: the panel holds `padded` columns of 32, rows a scale per block, `inputs` the tiles that `pair` says, the
        // scratch a block of weights, four tiles and all rows' totals.
        unsafe {
            let weights = (&raw mut (*scratch).weights).cast::<u8>();
            let products = (&raw mut (*scratch).products).cast::<f32>();
            let totals = (&raw mut (*scratch).totals).cast::<f32>();
            for block in 0..padded.div_ceil(fp8::BLOCK) {
                let first = block * fp8::BLOCK;
                let chunks = (padded - first).min(fp8::BLOCK) / amx::INPUTS;
                // BF16 weights lie in memory as tiles have them.
                let weights = if self.weight.form == Form::Bf16 {
                    packed.add(first * PANEL * 2).cast_mut()
                } else {
                    let normal = self.weight.normal(panel, block);
                    for pair in 0..chunks * amx::INPUTS / 2 {
                        let from = packed.add((first + 2 * pair) * PANEL);
                        amx::unpack(
                            from,
                            normal >> pair & 1 == 1,
                            weights.add(pair * 2 * amx::ROW),
                        );
                    }
                    weights
                };
                let scale = self.weight.scale(panel, block);
                for pair in 0..self.rows.len().div_ceil(2 * height) {
                    let (start, tiles) = self.pair(pair, height);
                    let a = inputs.add(start * amx::ROW + first / amx::INPUTS * tiles * size);
                    if tiles == 2 {
                        unit.two(a, weights, chunks, products);
                    } else {
                        unit.one(a, weights, chunks, products);
                    }
                    let first = 2 * pair * height;
                    for i in 0..(self.rows.len() - first).min(2 * height) {
                        let row = &self.rows[first + i];
                        let scale = _mm512_set1_ps(row.scale(block) * scale);
                        let from = products.add((i / height * 2 * height + i % height) * amx::ROWS);
                        let to = totals.add((first + i) * PANEL);
                        for half in 0..2 {
                            let product = _mm512_loadu_ps(from.add(half * height * amx::ROWS));
                            let to = to.add(half * amx::ROWS);
                            let total = if block == 0 {
                                _mm512_setzero_ps()
                            } else {
                                _mm512_loadu_ps(to)
                            };
                            _mm512_storeu_ps(to, _mm512_fmadd_ps(product, scale, total));
                        }
                    }
                }
            }
        }
    }
}
