//! How connections are made: a seam, so that the same code runs over TCP and in the simulator.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint, Error};

/// Makes a channel for an endpoint. Over TCP: [`tcp`].
pub type Dial = Arc<dyn Fn(Endpoint) -> Channel + Send + Sync>;

/// Connects over TCP when the channel is first used.
pub fn tcp() -> Dial {
    Arc::new(|endpoint| endpoint.tcp_nodelay(true).connect_lazy())
}

/// Peers that channels are kept for. More than a pool has; beyond it the map starts over.
const MAX_PEERS: usize = 1024;

/// Channels to receivers, one for each address. A channel reconnects by itself; who answers is checked by incarnation
/// on every stream.
pub struct Channels {
    dial: Dial,
    /// In an order of their own: a simulated worker that leaves closes them in the same order in every run.
    peers: Mutex<BTreeMap<String, Channel>>,
}

impl Channels {
    /// None yet.
    pub fn new(dial: Dial) -> Self {
        Self {
            dial,
            peers: Mutex::default(),
        }
    }

    /// The channel to `address` ("host:port").
    pub fn get(&self, address: &str) -> Result<Channel, Error> {
        let mut peers = self.peers.lock();
        if let Some(channel) = peers.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .connect_timeout(Duration::from_secs(3))
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5));
        let channel = (self.dial)(endpoint);
        if peers.len() == MAX_PEERS {
            peers.clear();
        }
        peers.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}
