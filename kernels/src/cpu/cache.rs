//! The paged latent cache of the CPU backend and the flags that keep compute and transfers apart in it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use half::bf16;

use super::memory::Memory;
use crate::backend::{BlockMemory, Error, HostView, Result};
use crate::tensor::DType;

/// Tokens of a block.
pub(super) const BLOCK_TOKENS: usize = 64;

/// Flag of a page that somebody writes; smaller values count its readers.
const WRITER: u32 = u32::MAX;

/// Longest wait for a page that somebody else holds. Copies in and out of a page take microseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// `[block][layer][64][width]` latents and rope keys. A *page* is one layer of one block; each has a flag (readers or
/// one writer), so that a transfer may send layer l of a block while layer l + 1 of it is computed.
#[derive(Debug)]
pub struct Cache {
    memory: Memory,
    flags: Vec<AtomicU32>,
    pub(super) blocks: usize,
    pub(super) layers: usize,
    pub(super) width: usize,
    pub(super) dtype: DType,
}

/// One page's values, in the cache's type.
#[derive(Clone, Copy)]
pub(super) enum Page<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl Page<'_> {
    /// Value `i` of the page.
    pub(super) fn get(&self, i: usize) -> f32 {
        match self {
            Page::F32(values) => values[i],
            Page::Bf16(values) => values[i].to_f32(),
        }
    }
}

impl Cache {
    pub(super) fn new(blocks: usize, layers: usize, width: usize, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::Bf16) || layers == 0 || width == 0 {
            return Err(Error::Shape {
                op: "cache",
                detail: format!("no cache of {layers} layers, width {width}, type {dtype:?}"),
            });
        }
        let bytes = blocks
            .checked_mul(layers * BLOCK_TOKENS * width * dtype.bytes())
            .ok_or(Error::OutOfMemory { bytes: usize::MAX })?;
        Ok(Self {
            memory: Memory::zeroed(bytes)?,
            flags: (0..blocks * layers).map(|_| AtomicU32::new(0)).collect(),
            blocks,
            layers,
            width,
            dtype,
        })
    }

    fn page_bytes(&self) -> usize {
        BLOCK_TOKENS * self.width * self.dtype.bytes()
    }

    /// Takes pages `(block, layer)` for reading, waiting a while for writers.
    pub(super) fn read_pages(
        &self,
        pages: impl IntoIterator<Item = (usize, usize)>,
    ) -> Result<Pages<'_>> {
        self.hold(pages.into_iter().map(|(b, l)| b * self.layers + l), false)
    }

    /// Takes one page for writing, waiting a while for others.
    pub(super) fn write_page(&self, block: usize, layer: usize) -> Result<Pages<'_>> {
        self.hold([block * self.layers + layer], true)
    }

    fn hold(&self, pages: impl IntoIterator<Item = usize>, write: bool) -> Result<Pages<'_>> {
        let mut pages_held = Pages {
            cache: self,
            held: Vec::new(),
            write,
        };
        for page in pages {
            let mut deadline = None;
            while !self.try_hold(page, write) {
                let now = Instant::now();
                if now > *deadline.get_or_insert(now + PATIENCE) {
                    return Err(Error::Device {
                        op: "cache",
                        detail: format!(
                            "layer {} of block {} is held by somebody else",
                            page % self.layers,
                            page / self.layers
                        ),
                    });
                }
                std::thread::yield_now();
            }
            pages_held.held.push(page);
        }
        Ok(pages_held)
    }

    fn try_hold(&self, page: usize, write: bool) -> bool {
        let flag = &self.flags[page];
        if write {
            return flag
                .compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        }
        flag.fetch_update(Ordering::Acquire, Ordering::Relaxed, |readers| {
            (readers < WRITER - 1).then(|| readers + 1)
        })
        .is_ok()
    }

    fn release(&self, page: usize, write: bool) {
        if write {
            self.flags[page].store(0, Ordering::Release);
        } else {
            self.flags[page].fetch_sub(1, Ordering::Release);
        }
    }

    /// Pages that `bytes` of `block` touch, or an error if there are no such bytes.
    fn pages_of(&self, block: usize, bytes: &Range<usize>) -> Result<Range<usize>> {
        if block >= self.blocks || bytes.start > bytes.end || bytes.end > self.block_bytes() {
            return Err(Error::Shape {
                op: "cache",
                detail: format!(
                    "bytes {bytes:?} of block {block}: there are {} blocks of {} bytes",
                    self.blocks,
                    self.block_bytes()
                ),
            });
        }
        let first = block * self.layers;
        let page = self.page_bytes();
        Ok(first + bytes.start / page..first + bytes.end.div_ceil(page))
    }
}

/// Pages held for reading or writing until this is dropped.
pub(super) struct Pages<'a> {
    cache: &'a Cache,
    held: Vec<usize>,
    write: bool,
}

impl Pages<'_> {
    /// Values of the `i`th page held.
    pub(super) fn page(&self, i: usize) -> Page<'_> {
        let cache = self.cache;
        // SAFETY: the page is one of the cache's (it has a flag) and its flag is taken, so nobody writes it meanwhile;
        // our own `store` needs `&mut self`.
        unsafe {
            let start = cache.memory.start().add(self.held[i] * cache.page_bytes());
            let len = BLOCK_TOKENS * cache.width;
            match cache.dtype {
                DType::F32 => Page::F32(std::slice::from_raw_parts(start.cast(), len)),
                _ => Page::Bf16(std::slice::from_raw_parts(start.cast(), len)),
            }
        }
    }

    /// Stores the values of one token in the (single) page held for writing.
    #[expect(
        clippy::cast_ptr_alignment,
        reason = "pages are aligned, entries are whole values"
    )]
    pub(super) fn store(&mut self, offset: usize, first: usize, values: &[f32]) {
        let cache = self.cache;
        assert!(self.write && offset < BLOCK_TOKENS && first + values.len() <= cache.width);
        let at = offset * cache.width + first;
        // SAFETY: the page is held for writing, so this is the only access to it; the range is inside it (assert above).
        unsafe {
            let start = cache
                .memory
                .start()
                .add(self.held[0] * cache.page_bytes() + at * cache.dtype.bytes());
            match cache.dtype {
                DType::F32 => std::slice::from_raw_parts_mut(start.cast::<f32>(), values.len())
                    .copy_from_slice(values),
                _ => std::slice::from_raw_parts_mut(start.cast::<bf16>(), values.len())
                    .iter_mut()
                    .zip(values)
                    .for_each(|(to, &from)| *to = bf16::from_f32(from)),
            }
        }
    }
}

impl Drop for Pages<'_> {
    fn drop(&mut self) {
        for &page in &self.held {
            self.cache.release(page, self.write);
        }
    }
}

/// Bytes lent out of a cache; its pages stay held for reading.
struct Lent {
    cache: Arc<Cache>,
    pages: Range<usize>,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: inside the memory (`pages_of` checked it), and the pages are held for reading while `self` lives.
        unsafe { std::slice::from_raw_parts(self.cache.memory.start().add(self.start), self.len) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        for page in self.pages.clone() {
            self.cache.release(page, false);
        }
    }
}

impl BlockMemory for Cache {
    fn block_bytes(&self) -> usize {
        self.layers * self.page_bytes()
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn read(&self, block: usize, bytes: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        let _held = self.hold(self.pages_of(block, &bytes)?, false)?;
        // SAFETY: inside the memory, and the pages are held for reading.
        read(unsafe {
            std::slice::from_raw_parts(
                self.memory
                    .start()
                    .add(block * self.block_bytes() + bytes.start),
                bytes.len(),
            )
        });
        Ok(())
    }

    fn write(
        &self,
        block: usize,
        bytes: Range<usize>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()> {
        let _held = self.hold(self.pages_of(block, &bytes)?, true)?;
        // SAFETY: inside the memory, and the pages are held for writing.
        write(unsafe {
            std::slice::from_raw_parts_mut(
                self.memory
                    .start()
                    .add(block * self.block_bytes() + bytes.start),
                bytes.len(),
            )
        });
        Ok(())
    }

    fn view(self: Arc<Self>, block: usize, bytes: Range<usize>) -> Option<HostView> {
        let pages = self.pages_of(block, &bytes).ok()?;
        // The holds pass to the view, which releases them.
        std::mem::take(&mut self.hold(pages.clone(), false).ok()?.held);
        Some(Box::new(Lent {
            start: block * self.block_bytes() + bytes.start,
            len: bytes.len(),
            pages,
            cache: self,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> Cache {
        Cache::new(3, 2, 5, DType::Bf16).unwrap()
    }

    #[test]
    fn bytes_written_by_the_host_are_what_compute_reads() {
        let cache = cache();
        let page = cache.page_bytes();
        let one = bf16::from_f32(1.5).to_le_bytes();
        cache
            .write(2, page..2 * page, &mut |to| {
                to.chunks_exact_mut(2).for_each(|v| v.copy_from_slice(&one));
            })
            .unwrap();
        let pages = cache.read_pages([(2, 0), (2, 1)]).unwrap();
        assert_eq!(pages.page(1).get(319), 1.5);
        assert_eq!(pages.page(0).get(0), 0.0);
    }

    #[test]
    fn a_layer_can_be_sent_while_the_next_is_written() {
        let cache = Arc::new(cache());
        let page = cache.page_bytes();
        let sent = cache.clone().view(1, 0..page).unwrap();
        let mut next = cache.write_page(1, 1).unwrap();
        next.store(0, 0, &[1.0; 5]);
        assert!(!cache.try_hold(2, true), "a lent page cannot be written");
        assert_eq!((*sent).as_ref().len(), page);
        drop(sent);
        assert!(cache.try_hold(2, true));
    }

    #[test]
    fn a_view_over_several_layers_gives_all_of_them_back() {
        let cache = Arc::new(cache());
        let bytes = cache.block_bytes();
        let view = cache.clone().view(0, 3..bytes - 3).unwrap();
        assert_eq!((*view).as_ref().len(), bytes - 6);
        drop(view);
        assert!(cache.flags.iter().all(|f| f.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn ranges_outside_a_block_are_refused() {
        let cache = cache();
        let bytes = cache.block_bytes();
        assert!(cache.read(0, 0..bytes + 1, &mut |_| {}).is_err());
        assert!(cache.read(3, 0..1, &mut |_| {}).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "the error under test")]
        let backwards = 4..2;
        assert!(cache.write(0, backwards, &mut |_| {}).is_err());
    }

    #[test]
    fn racing_readers_and_writers_never_see_half_a_write() {
        let cache = cache();
        let page = cache.page_bytes();
        std::thread::scope(|scope| {
            for thread in 1..=3u8 {
                let cache = &cache;
                scope.spawn(move || {
                    for round in 0..300u32 {
                        if round % 3 == 0 {
                            cache.write(0, 0..page, &mut |to| to.fill(thread)).unwrap();
                        }
                        cache
                            .read(0, 0..page, &mut |from| {
                                assert!(from.iter().all(|b| *b == from[0]));
                            })
                            .unwrap();
                    }
                });
            }
        });
    }
}
