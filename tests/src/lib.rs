//! What tests of the whole need. End to end: [`Up`](up::Up), a deployment of real processes, and [`http`], a client
//! simple enough to be trusted; everything listens on ports that the system chose, every wait ends, and nothing outlives
//! its test. In one thread: the deterministic simulator, [`sim`].

pub mod http;
pub mod sim;
pub mod up;
