//! The router on sockets and threads. Each lane is a thread with a runtime of its own that serves the connections it is
//! dealt and has a connection of its own to every worker: a request never waits for another thread to wake up, and no
//! lock of a connection is fought over. Connections stay where they were dealt: to one lane as long as that has few, so that
//! light load wakes one thread, then evenly.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

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
    seams::{Kept, Seams},
    serve::{Common, Config, Incoming, serve},
};

/// Connections that wait for a lane to look at them; more are closed at once.
const BACKLOG: usize = 1024;
/// More lanes are only more connections at the workers: one does thousands of requests a second.
const MOST_BY_DEFAULT: usize = 4;

/// Connections that a lane is given before the next lane is given any.
const FEW: usize = 16;

/// A connection and its seat.
type Dealt = (std::net::TcpStream, Seat);
/// A connection in the runtime of its lane.
type Taken = Kept<TcpStream, Seat>;

/// Counts a connection of a lane as long as it is open.
#[derive(Debug)]
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(seats: &Arc<AtomicUsize>) -> Self {
        seats.fetch_add(1, Relaxed);
        Self(Arc::clone(seats))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// A lane as the dealer sees it.
#[derive(Clone)]
struct Table {
    seats: Arc<AtomicUsize>,
    deal: mpsc::Sender<Dealt>,
}

/// The lane that a connection goes to, from the connections that each has: the first that has few, or the one that has
/// fewest.
fn choose(connections: impl Iterator<Item = usize> + Clone) -> usize {
    let lanes = connections.enumerate();
    let few = lanes.clone().find(|(_, count)| *count < FEW);
    few.or_else(|| lanes.min_by_key(|(_, count)| *count))
        .map_or(0, |(lane, _)| lane)
}

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
            let seats = Arc::<AtomicUsize>::default();
            to_http.push(Table {
                seats: Arc::clone(&seats),
                deal: http,
            });
            to_grpc.push(Table { seats, deal: grpc });
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
            impl Stream<Item = io::Result<Taken>> + Send + 'static,
            impl Stream<Item = io::Result<Taken>> + Send + 'static,
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

/// Deals connections out, each set to send what it is given at once, until `stop`.
async fn deal(listener: TcpListener, lanes: Vec<Table>, stop: CancellationToken) {
    loop {
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
            Ok(stream) => {
                let lane = &lanes[choose(lanes.iter().map(|lane| lane.seats.load(Relaxed)))];
                drop(lane.deal.try_send((stream, Seat::take(&lane.seats))));
            }
            Err(error) => {
                warn!(%error, "a connection could not be accepted");
                // Out of file descriptors, most likely: give them time to come back.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

fn taken(dealt: mpsc::Receiver<Dealt>) -> impl Stream<Item = io::Result<Taken>> {
    ReceiverStream::new(dealt)
        .map(|(stream, seat)| Ok(Kept::new(TcpStream::from_std(stream)?, seat)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_fills_up_before_the_next_then_all_grow_evenly() {
        let chosen = |connections: &[usize]| choose(connections.iter().copied());
        assert_eq!(chosen(&[0, 0]), 0);
        assert_eq!(chosen(&[FEW - 1, 0]), 0);
        assert_eq!(chosen(&[FEW, 3]), 1);
        assert_eq!(chosen(&[FEW + 9, FEW + 2]), 1);
        assert_eq!(chosen(&[FEW + 2, FEW + 2]), 0);
    }

    #[test]
    fn a_seat_is_free_again_when_its_connection_is_gone() {
        let seats = Arc::<AtomicUsize>::default();
        let seat = Seat::take(&seats);
        assert_eq!(seats.load(Relaxed), 1);
        drop(seat);
        assert_eq!(seats.load(Relaxed), 0);
    }
}
