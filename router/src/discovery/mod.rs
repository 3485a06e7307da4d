//! Where workers are. Whatever finds them (a fixed list, a file, later Kubernetes) publishes the whole set of addresses
//! whenever it changes; who a worker is, it says itself when it is asked.

mod file;

use std::{collections::BTreeSet, sync::Arc};

use tokio::sync::watch;

pub use file::{FileError, follow_file};

/// The addresses ("host:port") of all workers, and how they change.
pub type Endpoints = watch::Receiver<Arc<BTreeSet<String>>>;

/// A set that never changes.
pub fn fixed(addresses: impl IntoIterator<Item = String>) -> Endpoints {
    let addresses = addresses
        .into_iter()
        .map(|address| normalise(&address))
        .collect();
    watch::Sender::new(Arc::new(addresses)).subscribe()
}

/// An address without the scheme that people like to write before it.
fn normalise(address: &str) -> String {
    address
        .strip_prefix("http://")
        .unwrap_or(address)
        .trim_end_matches('/')
        .to_string()
}
