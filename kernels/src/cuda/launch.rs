//! Launching a kernel with clusters and programmatic dependent launch.

use std::ffi::c_void;

use cudarc::driver::{CudaStream, sys};

use super::gpu::SHARED_LIMIT;
use super::{Error, Gpu, Result, require};

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: usize,
    /// Blocks (in x) that form a cluster; 1 for none.
    pub cluster: u32,
    /// Programmatic dependent launch: may start while the kernel before it in the stream ends. Every kernel here waits
    /// for that one's results before it reads them.
    pub overlap: bool,
}

impl Launch {
    /// `blocks` of `threads` without shared memory or clusters.
    pub fn new(blocks: u32, threads: u32, overlap: bool) -> Self {
        Self {
            grid: [blocks, 1, 1],
            threads,
            shared_bytes: 0,
            cluster: 1,
            overlap,
        }
    }

    /// Enqueues kernel `name` of `program`. `arguments` point to the kernel's parameters in order.
    ///
    /// # Safety
    /// The arguments must match the kernel's parameters in number, size and meaning.
    pub(super) unsafe fn run(
        self,
        gpu: &Gpu,
        stream: &CudaStream,
        program: &'static str,
        name: &'static str,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        require(name, self.shared_bytes <= SHARED_LIMIT, || {
            format!(
                "{} bytes of shared memory, a block has {SHARED_LIMIT}",
                self.shared_bytes
            )
        })?;
        let function = gpu.function(program, name)?;
        let mut attributes = [attribute_cluster(self.cluster), attribute_overlap()];
        let attributes = match (self.cluster > 1, self.overlap) {
            (true, true) => &mut attributes[..],
            (true, false) => &mut attributes[..1],
            (false, true) => &mut attributes[1..],
            (false, false) => &mut [],
        };
        let config = sys::CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the function belongs to the stream's context; the caller vouches for the arguments, which the driver
        // copies before it returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|source| Error::Driver {
            what: format!("launching {name} with {self:?}"),
            source,
        })
    }
}

fn attribute_cluster(blocks: u32) -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.clusterDim.x = blocks;
    value.clusterDim.y = 1;
    value.clusterDim.z = 1;
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value,
    }
}

fn attribute_overlap() -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value,
    }
}

/// The pointers to a kernel's parameters, from the parameters themselves.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        &mut [$((&raw const $argument).cast::<std::ffi::c_void>().cast_mut()),*]
    };
}
pub(super) use arguments;
