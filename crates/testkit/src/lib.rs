//! Small checkpoints and scripted parts for tests.

pub mod checkpoint;
