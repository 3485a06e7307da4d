//! Typed stretches of device memory.

use std::marker::PhantomData;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

/// A stretch of device memory that somebody else owns and keeps alive while work on it is enqueued. `T` is the element
/// as the host sees it: `u8` for FP8, `u16` for BF16.
#[derive(Debug)]
pub struct Span<T> {
    address: CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Clone for Span<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Span<T> {}

impl<T> Span<T> {
    /// The whole of a slice. The stream only orders cudarc's own events, which captured contexts turn off.
    pub fn of(slice: &CudaSlice<T>, stream: &CudaStream) -> Self {
        Self {
            address: slice.device_ptr(stream).0,
            len: slice.len(),
            element: PhantomData,
        }
    }

    /// `len` elements at `address`.
    ///
    /// # Safety
    /// The memory must stay allocated while enqueued work uses it.
    pub unsafe fn from_raw(address: CUdeviceptr, len: usize) -> Self {
        Self {
            address,
            len,
            element: PhantomData,
        }
    }

    /// The elements from `first` on.
    ///
    /// # Panics
    /// If `first` is beyond the end.
    #[must_use]
    pub fn from(self, first: usize) -> Self {
        assert!(first <= self.len, "span of {} cut at {first}", self.len);
        Self {
            address: self.address + (first * size_of::<T>()) as u64,
            len: self.len - first,
            element: PhantomData,
        }
    }

    /// Device address of the first element.
    pub fn address(self) -> CUdeviceptr {
        self.address
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// True when there is no element.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}
