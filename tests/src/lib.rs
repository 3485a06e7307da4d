//! What end-to-end tests need: [`Up`](up::Up), a deployment of real processes, and [`http`], a client simple enough to
//! be trusted. Everything listens on ports that the system chose, every wait ends, and nothing outlives its test.

pub mod http;
pub mod up;
