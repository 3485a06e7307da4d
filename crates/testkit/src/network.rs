//! A network in memory: listeners by name, connections that can be cut. No ports, and tokio's paused clock works.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::mpsc,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

/// Bytes that a connection holds in each direction.
const BUFFER_BYTES: usize = 256 << 10;

/// Names and who listens there.
#[derive(Clone, Debug, Default)]
pub struct Network(Arc<Mutex<BTreeMap<String, Listener>>>);

#[derive(Clone, Debug)]
struct Listener {
    accepted: mpsc::Sender<Connection>,
    power: CancellationToken,
}

impl Network {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens at `address` until `power` is cancelled, which cuts all connections there as well.
    pub fn listen(
        &self,
        address: &str,
        power: CancellationToken,
    ) -> impl Stream<Item = io::Result<Connection>> + Send + use<> {
        let (accepted, connections) = mpsc::channel(64);
        self.0
            .lock()
            .insert(address.into(), Listener { accepted, power });
        ReceiverStream::new(connections).map(Ok)
    }

    /// Connects to whoever listens at `address`.
    ///
    /// # Errors
    /// When nobody does.
    pub async fn dial(&self, address: &str) -> io::Result<Connection> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let listener = self.0.lock().get(address).cloned().ok_or_else(refused)?;
        if listener.power.is_cancelled() {
            return Err(refused());
        }
        let (near, far) = tokio::io::duplex(BUFFER_BYTES);
        let connection = |io| Connection::new(io, &listener.power);
        listener
            .accepted
            .send(connection(far))
            .await
            .map_err(|_| refused())?;
        Ok(connection(near))
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    io: DuplexStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn new(io: DuplexStream, power: &CancellationToken) -> Self {
        Self {
            io,
            cut: Box::pin(power.clone().cancelled_owned()),
        }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
