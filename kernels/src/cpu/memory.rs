//! Host memory behind CPU tensors: aligned for the widest vectors, zeroed by the system on first touch.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;

use crate::backend::{Error, Result};

/// Alignment of every allocation in bytes: a cache line and an AVX-512 register.
const ALIGN: usize = 64;

/// An allocation of bytes. Pages that nobody has written take no room.
#[derive(Debug)]
pub struct Memory {
    owner: Owner,
    /// First aligned byte.
    start: *mut u8,
    bytes: usize,
}

#[derive(Debug)]
enum Owner {
    /// Allocated alone.
    Own { base: *mut u8, layout: Layout },
    /// A piece of an arena.
    Arena(Arena),
}

// SAFETY: the bytes are owned, and reached only through `&self` (shared) and `&mut self` (exclusive) methods; `Cache`,
// which shares its memory, does its own locking.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` zeroed bytes.
    ///
    /// # Errors
    /// If the system has no such room.
    pub(super) fn zeroed(bytes: usize) -> Result<Self> {
        // A small alignment and our own rounding: the allocator then takes fresh pages instead of clearing old ones.
        let out_of_memory = Error::OutOfMemory { bytes };
        let Ok(layout) = Layout::from_size_align(bytes.saturating_add(ALIGN), 16) else {
            return Err(out_of_memory);
        };
        // SAFETY: the layout has a size of at least `ALIGN`.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            return Err(out_of_memory);
        }
        // SAFETY: fewer than `ALIGN` bytes are skipped, and the allocation is that much larger.
        let start = unsafe { base.add(base.align_offset(ALIGN)) };
        Ok(Self {
            owner: Owner::Own { base, layout },
            start,
            bytes,
        })
    }

    /// A copy of `data`.
    pub(super) fn copied(data: &[u8]) -> Result<Self> {
        let mut memory = Self::zeroed(data.len())?;
        memory.slice_mut().copy_from_slice(data);
        Ok(memory)
    }

    /// Bytes asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory as elements; bytes that make no whole element are left out.
    pub fn slice<T: Pod>(&self) -> &[T] {
        const { assert!(align_of::<T>() <= ALIGN && size_of::<T>() > 0) };
        // SAFETY: `bytes` initialised (zeroed) bytes lie at `start`, aligned; any bits are a `Pod`.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes / size_of::<T>()) }
    }

    /// The memory as elements, to write.
    pub fn slice_mut<T: Pod>(&mut self) -> &mut [T] {
        const { assert!(align_of::<T>() <= ALIGN && size_of::<T>() > 0) };
        // SAFETY: as for `slice`, and `&mut self` makes it the only way in.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.bytes / size_of::<T>()) }
    }

    /// The first byte, for owners that share the memory under locks of their own.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.owner {
            // SAFETY: allocated in `zeroed` with this layout.
            Owner::Own { base, layout } => unsafe { dealloc(*base, *layout) },
            Owner::Arena(arena) => {
                let mut state = arena.state();
                state.free.push((self.bytes, self.start as usize));
            }
        }
    }
}

/// Bytes of a large page.
const LARGE_PAGE: usize = 2 << 20;

/// Bytes of a region, and the most that a piece may have before it gets a region of its own.
const REGION: usize = 16 * LARGE_PAGE;

/// Memory for weights, in large pages where the system gives them: reading all weights for every token is what a small
/// batch does, and with pages of 4 KiB the look-ups of addresses slow it. A dropped piece is used again for one of the
/// same size, as when an expert is replaced; the rest goes back when the arena and all its pieces are gone.
#[derive(Clone, Debug, Default)]
pub(super) struct Arena(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    regions: Vec<Memory>,
    /// Next byte of the last region, and how many are left.
    next: usize,
    left: usize,
    /// Sizes and addresses of dropped pieces.
    free: Vec<(usize, usize)>,
}

impl Arena {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change to the state is a single step, so it is whole also after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `bytes` zeroed bytes.
    ///
    /// # Errors
    /// If the system has no such room.
    pub(super) fn zeroed(&self, bytes: usize) -> Result<Memory> {
        let mut state = self.state();
        let free = state.free.iter().position(|(size, _)| *size == bytes);
        let start = if let Some(free) = free {
            let start = state.free.swap_remove(free).1 as *mut u8;
            // SAFETY: a dropped piece of `bytes` bytes, which nobody else has now.
            unsafe { start.write_bytes(0, bytes) };
            start
        } else {
            let size = bytes.max(1).next_multiple_of(ALIGN);
            if size > state.left {
                let region = size.max(REGION).next_multiple_of(LARGE_PAGE);
                let memory = Memory::zeroed(region + LARGE_PAGE)?;
                let skipped = memory.start.align_offset(LARGE_PAGE);
                state.next = memory.start as usize + skipped;
                state.left = region;
                advise(state.next, region);
                state.regions.push(memory);
            }
            let start = state.next as *mut u8;
            state.next += size;
            state.left -= size;
            start
        };
        Ok(Memory {
            owner: Owner::Arena(self.clone()),
            start,
            bytes,
        })
    }
}

/// Asks for large pages; where the system has none, small ones do.
fn advise(start: usize, bytes: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: the range is inside an allocation and starts at a page; the advice changes no contents.
    unsafe {
        libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_zeroed_at_any_size() {
        for bytes in [0, 1, 63, 64, 65, 4097] {
            let memory = Memory::zeroed(bytes).unwrap();
            assert_eq!(memory.start as usize % ALIGN, 0);
            assert_eq!(memory.slice::<u8>(), vec![0; bytes]);
            assert_eq!(memory.slice::<f32>().len(), bytes / 4);
        }
    }

    #[test]
    fn too_much_memory_is_an_error() {
        assert!(matches!(
            Memory::zeroed(usize::MAX - 8),
            Err(Error::OutOfMemory { .. })
        ));
    }

    #[test]
    fn pieces_of_an_arena_are_apart_zeroed_and_used_again() {
        let arena = Arena::default();
        let sizes = [1, 63, 64, 4097, REGION - 1, 3, REGION + 5];
        let mut pieces: Vec<Memory> = sizes.map(|bytes| arena.zeroed(bytes).unwrap()).into();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.start as usize % ALIGN, 0);
            assert!(piece.slice::<u8>().iter().all(|byte| *byte == 0));
            piece.slice_mut::<u8>().fill(i as u8 + 1);
        }
        for (i, (piece, bytes)) in pieces.iter().zip(sizes).enumerate() {
            assert_eq!(piece.bytes(), bytes);
            assert!(piece.slice::<u8>().iter().all(|byte| *byte == i as u8 + 1));
        }
        let regions = arena.state().regions.len();
        let old = pieces.pop().unwrap().start;
        let again = arena.zeroed(REGION + 5).unwrap();
        assert_eq!(again.start, old);
        assert!(again.slice::<u8>().iter().all(|byte| *byte == 0));
        assert_eq!(arena.state().regions.len(), regions);
    }
}
