//! Listeners and connections over the simulated network, in the shape the production code takes them.

use std::{
    collections::BTreeSet,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Endpoint, Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

/// A simulated connection that tonic's server takes.
#[derive(Debug)]
pub(super) struct Connection(TcpStream);

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Connections to `port` of the simulated host that calls this.
///
/// # Errors
/// If the port is taken on this host.
pub(super) async fn listen(
    port: u16,
) -> io::Result<impl Stream<Item = io::Result<Connection>> + Send> {
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    Ok(futures::stream::unfold(listener, |listener| async move {
        let accepted = listener
            .accept()
            .await
            .map(|(stream, _)| Connection(stream));
        Some((accepted, listener))
    }))
}

/// Workers to which the next large write on the KV plane gets one wrong bit.
#[derive(Clone, Debug, Default)]
pub(super) struct Flips(Arc<Mutex<BTreeSet<String>>>);

impl Flips {
    /// The next one to `worker`.
    pub(super) fn add(&self, worker: &str) {
        self.0.lock().insert(worker.to_owned());
    }
}

/// Smaller writes hold headers only, which HTTP/2 itself finds broken.
const LARGE: usize = 1024;

/// An outgoing connection that may change a bit.
struct Outgoing {
    stream: TcpStream,
    host: String,
    flips: Flips,
}

impl AsyncRead for Outgoing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Outgoing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if buf.len() < LARGE || !this.flips.0.lock().contains(&this.host) {
            return Pin::new(&mut this.stream).poll_write(cx, buf);
        }
        let mut changed = buf.to_vec();
        // Well inside the payload of a piece.
        let place = changed.len() * 3 / 4;
        changed[place] ^= 0x10;
        let written = Pin::new(&mut this.stream).poll_write(cx, &changed);
        if matches!(written, Poll::Ready(Ok(written)) if written > place) {
            this.flips.0.lock().remove(&this.host);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Dials simulated hosts by name.
pub(super) fn dial(flips: &Flips) -> Arc<dyn Fn(Endpoint) -> Channel + Send + Sync> {
    let flips = flips.clone();
    Arc::new(move |endpoint| {
        let flips = flips.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |uri: Uri| {
            let flips = flips.clone();
            async move {
                let host = uri
                    .host()
                    .ok_or_else(|| io::Error::other("an address without a host"))?
                    .to_owned();
                let port = uri.port_u16().unwrap_or(80);
                let stream = TcpStream::connect((host.as_str(), port)).await?;
                io::Result::Ok(TokioIo::new(Outgoing {
                    stream,
                    host,
                    flips,
                }))
            }
        }))
    })
}

/// Connects to "host:port".
///
/// # Errors
/// As a connection does.
pub(super) async fn connect(address: String) -> io::Result<Pin<Box<dyn router::seams::Io>>> {
    let (host, port) = address
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
        .ok_or_else(|| io::Error::other(format!("'{address}' is not host:port")))?;
    Ok(Box::pin(TcpStream::connect((host, port)).await?))
}
