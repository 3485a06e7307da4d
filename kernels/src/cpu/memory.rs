//! Host memory behind CPU tensors: aligned for the widest vectors, zeroed by the system on first touch.

use std::alloc::{Layout, alloc_zeroed, dealloc};

use bytemuck::Pod;

use crate::backend::{Error, Result};

/// Alignment of every allocation in bytes: a cache line and an AVX-512 register.
const ALIGN: usize = 64;

/// An allocation of bytes. Pages that nobody has written take no room.
#[derive(Debug)]
pub struct Memory {
    base: *mut u8,
    layout: Layout,
    /// First aligned byte.
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the allocation is owned, and reached only through `&self` (shared) and `&mut self` (exclusive) methods;
// `Cache`, which shares its memory, does its own locking.
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
            base,
            layout,
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
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.base, self.layout) }
    }
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
}
