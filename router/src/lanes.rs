//! The router on sockets and threads. Each lane is a thread with a runtime of its own that serves the connections it is
//! dealt and has a connection of its own to every worker: a request never waits for another thread to wake up, and no
//! lock of a connection is fought over. One task deals connections out in turn.

use std::{io, sync::Arc, thread, time::Duration};

use anyhow::Context;
use futures::{Stream, StreamExt, future::try_join_all};
use telemetry::shutdown::Tasks;
use text::Text;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    discovery::Endpoints,
    seams::Seams,
    serve::{Common, Config, Incoming, serve},
};

/// Connections that wait for a lane to look at them; more are closed at once.
const BACKLOG: usize = 1024;
/// More lanes are only more connections at the workers: one does thousands of requests a second.
const MOST_BY_DEFAULT: usize = 4;

type Dealt = mpsc::Sender<std::net::TcpStream>;

/// Lanes for a machine: as many as asked for, or one a core up to a few.
pub(crate) fn count(wanted: usize) -> usize {
    if wanted > 0 {
        return wanted;
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    cores.min(MOST_BY_DEFAULT)
}

/// What every lane is started with.
pub(crate) struct Lanes {
    pub(crate) count: usize,
    pub(crate) config: Config,
    pub(crate) text: Arc<Text>,
    pub(crate) endpoints: Endpoints,
    pub(crate) common: Common,
    pub(crate) seams: fn() -> Seams,
    /// Drain.
    pub(crate) stop: CancellationToken,
    /// End at once.
    pub(crate) abort: CancellationToken,
}

impl Lanes {
    /// Serves what comes in at the listeners; returns when every lane has drained.
    ///
    /// # Errors
    /// When a thread cannot be started, or a lane fails.
    pub(crate) async fn serve(
        mut self,
        http: TcpListener,
        grpc: TcpListener,
        tasks: &Tasks,
    ) -> anyhow::Result<()> {
        // The limit is the process's.
        self.config.http.max_connections = self.config.http.max_connections.div_ceil(self.count);
        let (mut to_http, mut to_grpc, mut lanes) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..self.count {
            let (http, http_dealt) = mpsc::channel(BACKLOG);
            let (grpc, grpc_dealt) = mpsc::channel(BACKLOG);
            to_http.push(http);
            to_grpc.push(grpc);
            let incoming = Incoming {
                http: taken(http_dealt),
                grpc: taken(grpc_dealt),
            };
            lanes.push(self.start(index, incoming)?);
        }
        let stop = &self.stop;
        tasks.spawn("http", deal(http, to_http, stop.clone()));
        tasks.spawn("grpc", deal(grpc, to_grpc, stop.clone()));
        let ended = lanes.into_iter().map(|lane| async {
            let ended = lane.await.context("a lane of the router panicked")?;
            ended.context("a lane of the router failed")
        });
        try_join_all(ended).await.map(drop)
    }

    fn start(
        &self,
        index: usize,
        incoming: Incoming<
            impl Stream<Item = io::Result<TcpStream>> + Send + 'static,
            impl Stream<Item = io::Result<TcpStream>> + Send + 'static,
        >,
    ) -> anyhow::Result<oneshot::Receiver<anyhow::Result<()>>> {
        let serving = serve(
            self.config.clone(),
            Arc::clone(&self.text),
            self.endpoints.clone(),
            incoming,
            (self.seams)(),
            self.common.clone(),
            self.stop.clone(),
        );
        let (ended, lane) = oneshot::channel();
        let abort = self.abort.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let run = move || {
            let served = runtime.block_on(abort.run_until_cancelled(serving));
            // Nobody waits once the process is told to end at once.
            let _ = ended.send(served.unwrap_or(Ok(())));
        };
        thread::Builder::new()
            .name(format!("lane-{index}"))
            .spawn(run)?;
        Ok(lane)
    }
}

/// Deals connections out in turn, each set to send what it is given at once, until `stop`.
async fn deal(listener: TcpListener, lanes: Vec<Dealt>, stop: CancellationToken) {
    for lane in lanes.iter().cycle() {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = accepted.and_then(|(stream, _)| {
            stream.set_nodelay(true)?;
            stream.into_std()
        });
        match stream {
            // A lane that does not come to it has too many already: the connection is closed.
            Ok(stream) => drop(lane.try_send(stream)),
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                // Out of file descriptors, most likely: give them time to come back.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

fn taken(dealt: mpsc::Receiver<std::net::TcpStream>) -> impl Stream<Item = io::Result<TcpStream>> {
    ReceiverStream::new(dealt).map(TcpStream::from_std)
}
