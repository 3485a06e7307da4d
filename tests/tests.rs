//! Tests of Hadal as a whole. One binary; a module for each subject.

mod e2e;
