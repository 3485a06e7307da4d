//! Descriptors for the bulk tensor copies (TMA).

use cudarc::driver::sys;

use super::{Error, Result};

/// Element types that tensor maps here describe.
#[derive(Clone, Copy, Debug)]
pub(super) enum Element {
    /// One byte.
    Fp8,
    /// Two bytes.
    Bf16,
}

/// A map over `dims` (innermost first) with row pitches `strides` in bytes (of dimension 1 and up), copied in boxes of
/// `shape` whose innermost side is 128 bytes, laid out in shared memory with the 128-byte swizzle. Boxes that reach
/// beyond the tensor read zeros.
pub(super) fn tensor_map(
    kernel: &'static str,
    element: Element,
    address: sys::CUdeviceptr,
    dims: &[u64],
    strides: &[u64],
    shape: &[u32],
) -> Result<sys::CUtensorMap> {
    debug_assert!(dims.len() == strides.len() + 1 && dims.len() == shape.len());
    let data_type = match element {
        Element::Fp8 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        Element::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let steps = [1u32; 5];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: all arrays have as many entries as the rank says; the driver validates the rest.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            dims.len() as u32,
            address as *mut std::ffi::c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            shape.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|source| Error::Driver {
        what: format!("{kernel}: tensor map of {dims:?}, strides {strides:?}, box {shape:?}"),
        source,
    })?;
    Ok(map)
}
