//! Small checkpoints and scripted parts for tests.

pub mod checkpoint;
pub mod fake_worker;
pub mod network;
pub mod scripted;
pub mod toy;
