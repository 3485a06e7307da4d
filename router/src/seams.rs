//! What the router takes from outside, so that the same code runs in production and, whole, in one thread under a
//! simulator: connections, randomness and the calendar. (Time is tokio's, which a simulator sets.)

use std::{io, pin::Pin, sync::Arc};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection of any kind.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// A connection whose kind is not known.
pub type BoxIo = Pin<Box<dyn Io>>;

/// Opens a connection to "host:port".
pub type Dial = Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<BoxIo>> + Send + Sync>;

/// All of them.
#[derive(Clone)]
pub struct Seams {
    /// Opens connections to workers.
    pub dial: Dial,
    /// Source of randomness.
    pub entropy: Entropy,
    /// Seconds since 1970, for the `created` field of answers.
    pub unix_time: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl std::fmt::Debug for Seams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seams").finish_non_exhaustive()
    }
}

impl Seams {
    /// TCP, the operating system's randomness, the machine's clock.
    pub fn system() -> Self {
        Self {
            dial: Arc::new(|address| Box::pin(dial_tcp(address))),
            entropy: Entropy::from_os(),
            unix_time: Arc::new(|| {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                now.map_or(0, |since| since.as_secs())
            }),
        }
    }
}

async fn dial_tcp(address: String) -> io::Result<BoxIo> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(Box::pin(stream))
}

/// Random numbers: unpredictable in production, repeatable from a seed in a simulation.
#[derive(Clone)]
pub struct Entropy(Arc<Mutex<StdRng>>);

impl Entropy {
    /// Unpredictable.
    pub fn from_os() -> Self {
        Self(Arc::new(Mutex::new(StdRng::from_rng(&mut rand::rng()))))
    }

    /// Repeatable.
    pub fn seeded(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(StdRng::seed_from_u64(seed))))
    }

    /// 64 random bits.
    pub fn u64(&self) -> u64 {
        self.0.lock().next_u64()
    }

    /// 128 random bits.
    pub fn u128(&self) -> u128 {
        let mut random = self.0.lock();
        u128::from(random.next_u64()) << 64 | u128::from(random.next_u64())
    }
}

impl std::fmt::Debug for Entropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Entropy")
    }
}
