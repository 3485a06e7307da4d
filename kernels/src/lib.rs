//! Device memory and the operations DeepSeek-V3 is made of, behind one trait.
//!
//! [`Backend`] is what the network is written against. It is shaped by what a GPU needs: every operation is enqueued
//! on a stream over device buffers, works on shapes whose upper bounds are known before the step, reads block tables,
//! lengths and expert counts from device memory, and never copies to the host behind the caller's back.

pub mod backend;
pub mod cases;
pub mod cpu;
pub mod cuda;
pub mod fp8;
pub mod tensor;

pub use backend::{Backend, BlockMemory, Error, Precision, Result};
pub use cpu::Cpu;
pub use tensor::{DType, Tensor};
