//! What the router takes from outside, so that the same code runs in production and, whole, in one thread under a
//! simulator: connections, randomness and the calendar. (Time is tokio's, which a simulator sets.)

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection of any kind.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// A connection whose kind is not known.
pub type BoxIo = Pin<Box<dyn Io>>;

/// A connection, and what is kept as long as it is open.
#[derive(Debug)]
pub(crate) struct Kept<IO, T> {
    io: IO,
    _kept: T,
}

impl<IO, T> Kept<IO, T> {
    pub(crate) fn new(io: IO, kept: T) -> Self {
        Self { io, _kept: kept }
    }
}

impl<IO: AsyncRead + Unpin, T: Unpin> AsyncRead for Kept<IO, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin, T: Unpin> AsyncWrite for Kept<IO, T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

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
