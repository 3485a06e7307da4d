//! Small checkpoints and scripted parts for tests.

pub mod checkpoint;
pub mod scripted;
pub mod toy;
