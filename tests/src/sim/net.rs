//! Listeners and connections over the simulated network, in the shape the production code takes them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
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

use super::trace::Trace;

/// The simulated network in the shape that production code's seams want; clones are the same network.
#[derive(Clone, Debug, Default)]
pub(super) struct Net {
    trace: Trace,
    /// Workers to which the next large write on the KV plane gets one wrong bit.
    flips: Arc<Mutex<BTreeSet<String>>>,
    /// While a host dies: its connections that were dropped so far.
    dropped: Arc<Mutex<Option<Dropped>>>,
}

/// Connections by their two ends.
type Dropped = BTreeMap<(SocketAddr, SocketAddr), TcpStream>;

/// Smaller writes hold headers only, which HTTP/2 itself finds broken.
const LARGE: usize = 1024;

impl Net {
    /// A network that notes every write in `trace`.
    pub(super) fn new(trace: Trace) -> Self {
        Self {
            trace,
            ..Self::default()
        }
    }

    /// A host dies next. tokio drops the tasks of a runtime in an order that depends on how many tasks the process had
    /// before, and every connection's end is a message: they wait for [`Net::close`], which sends them in an order
    /// of their own.
    pub(super) fn host_dies(&self) {
        *self.dropped.lock() = Some(Dropped::new());
    }

    /// Closes the connections of the host that died, and which calls this.
    pub(super) fn close(&self) {
        let dropped = self.dropped.lock().take();
        drop(dropped);
    }

    /// One bit changes in the next large write to `worker`.
    pub(super) fn flip(&self, worker: &str) {
        self.flips.lock().insert(worker.to_owned());
    }

    /// Connections to `port` of the simulated host that calls this.
    ///
    /// # Errors
    /// If the port is taken on this host.
    pub(super) async fn listen(
        &self,
        port: u16,
    ) -> io::Result<impl Stream<Item = io::Result<Connection>> + Send + use<>> {
        let listener = TcpListener::bind(("0.0.0.0", port)).await?;
        let state = (listener, self.clone());
        Ok(futures::stream::unfold(
            state,
            |(listener, net)| async move {
                let accepted = listener.accept().await;
                let accepted = accepted.map(|(stream, _)| net.connection(stream, None));
                Some((accepted, (listener, net)))
            },
        ))
    }

    /// Dials simulated hosts by name.
    pub(super) fn dial(&self) -> Arc<dyn Fn(Endpoint) -> Channel + Send + Sync> {
        let net = self.clone();
        Arc::new(move |endpoint| {
            let net = net.clone();
            endpoint.connect_with_connector_lazy(tower::service_fn(move |uri: Uri| {
                let net = net.clone();
                async move {
                    let host = uri
                        .host()
                        .ok_or_else(|| io::Error::other("an address without a host"))?
                        .to_owned();
                    let port = uri.port_u16().unwrap_or(80);
                    let stream = TcpStream::connect((host.as_str(), port)).await?;
                    io::Result::Ok(TokioIo::new(net.connection(stream, Some(host))))
                }
            }))
        })
    }

    /// Connects to "host:port".
    ///
    /// # Errors
    /// As a connection does.
    pub(super) async fn connect(
        self,
        address: String,
    ) -> io::Result<Pin<Box<dyn router::seams::Io>>> {
        let (host, port) = address
            .rsplit_once(':')
            .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
            .ok_or_else(|| io::Error::other(format!("'{address}' is not host:port")))?;
        let stream = TcpStream::connect((host, port)).await?;
        Ok(Box::pin(self.connection(stream, None)))
    }

    fn connection(&self, stream: TcpStream, flips_to: Option<String>) -> Connection {
        Connection {
            stream: Some(stream),
            flips_to,
            net: self.clone(),
        }
    }
}

/// A simulated connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Taken when it is dropped.
    stream: Option<TcpStream>,
    /// Bits for this host may change on it.
    flips_to: Option<String>,
    net: Net,
}

impl Connection {
    fn stream(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.stream.as_mut().expect("taken when dropped only"))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let flips = Arc::clone(&self.net.flips);
        let host = self.flips_to.as_ref();
        let host = host.filter(|host| buf.len() >= LARGE && flips.lock().contains(*host));
        let Some(host) = host.cloned() else {
            return self.stream().poll_write(cx, buf);
        };
        let mut changed = buf.to_vec();
        // Well inside the payload of a piece.
        let place = changed.len() * 3 / 4;
        changed[place] ^= 0x10;
        let written = self.stream().poll_write(cx, &changed);
        if matches!(written, Poll::Ready(Ok(written)) if written > place) {
            flips.lock().remove(&host);
        }
        written
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else {
            return;
        };
        // Closes it here where no host dies.
        if let Some(dropped) = &mut *self.net.dropped.lock()
            && let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr())
        {
            dropped.insert((local, peer), stream);
        }
    }
}

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
        self.stream().poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.poll_send(cx, buf);
        if let Poll::Ready(Ok(_)) = &written {
            // Not how many bytes: the date in a response's header is of the wall clock, and of varying length.
            let stream = self.stream();
            let ends = (stream.local_addr()?, stream.peer_addr()?);
            self.net.trace.note(ends);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
