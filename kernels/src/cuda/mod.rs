//! DeepSeek-V3's operations on a Hopper GPU: kernels from `kernels/cuda/*.cu`, compiled at run time by NVRTC, launched
//! through cudarc.
//!
//! [`Gpu`] opens a device and owns the compiled kernels. One module per operation has the typed launchers. They take
//! device memory ([`Span`]) and a stream from outside, check shapes, and only enqueue: nothing inside allocates,
//! synchronises or reads back, so that every launcher can be captured in a CUDA graph. Counts, lengths and block tables
//! are read by the kernels from device memory. The libraries are loaded when [`Gpu::open`] runs: a binary with this
//! module starts on a machine without a GPU and gets [`Error::NoDriver`].

mod gpu;
mod launch;
mod program;
mod span;
mod tensor_map;

pub mod blas;
pub mod gemm;
pub mod mla;
pub mod pointwise;
pub mod prefill;
pub mod probe;
pub mod routing;
pub mod rows;
pub mod sampling;

pub use gpu::Gpu;
pub use launch::Launch;
pub use program::{Program, compile};
pub use span::Span;

/// What can go wrong on the way to a running kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine has no NVIDIA driver, NVRTC or cuBLASLt library.
    #[error("no CUDA here: {0} cannot be loaded")]
    NoDriver(&'static str),
    /// A call of the driver failed.
    #[error("{what}: {source}")]
    Driver {
        /// What was being done, with the kernel's name and shape where there is one.
        what: String,
        /// The driver's error.
        source: cudarc::driver::DriverError,
    },
    /// NVRTC refused a source file.
    #[error("cannot compile {file}: {log}")]
    Compile {
        /// Name of the source.
        file: &'static str,
        /// The compiler's words.
        log: String,
    },
    /// cuBLASLt failed.
    #[error("cublaslt, {what}: {status}")]
    Blas {
        /// What was being done, with the shape.
        what: String,
        /// The library's status.
        status: String,
    },
    /// Arguments that a kernel cannot take.
    #[error("{kernel}: {detail}")]
    Shape {
        /// The kernel.
        kernel: &'static str,
        /// What does not fit, with the numbers.
        detail: String,
    },
}

/// Result of a launcher.
pub type Result<T> = std::result::Result<T, Error>;

/// Fails with [`Error::Shape`] unless `holds`.
fn require(kernel: &'static str, holds: bool, detail: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::Shape {
            kernel,
            detail: detail(),
        })
    }
}
