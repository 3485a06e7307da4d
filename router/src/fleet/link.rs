//! Keeps one address connected: dials, asks who is there, follows its load and cache, and takes it out of the fleet the
//! moment the connection ends. One task an address, which also drives the connection.

use std::{sync::Arc, time::Duration};

use proto::v1::{DescribeRequest, WatchRequest, WatchResponse, worker_client::WorkerClient};
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::{
    Fleet, FleetConfig,
    channel::Channel,
    worker::{Nameless, Worker},
};
use crate::seams::Seams;

/// Largest message of a worker: a snapshot of all its blocks' hashes, 8 bytes each.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why a session with a worker ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("cannot connect: {0}")]
    Dial(#[source] std::io::Error),
    #[error("no answer in time to '{0}'")]
    Late(&'static str),
    #[error("{0}")]
    Call(#[from] Status),
    #[error(transparent)]
    Nameless(#[from] Nameless),
    #[error("the address '{0}' is not one")]
    Address(String),
    #[error("a message of the worker's watch was lost ({expected} expected, {got} came)")]
    Gap { expected: u64, got: u64 },
    #[error("the worker left")]
    Left,
}

/// Keeps `address` connected until dropped.
pub(super) async fn keep(address: String, fleet: Arc<Fleet>, config: FleetConfig, seams: Seams) {
    let mut failures = 0_u32;
    loop {
        let was_there = fleet.connections();
        let end = session(&address, &fleet, config, &seams).await;
        // A worker that was there is likely to come back soon; one that never was, not so.
        failures = if fleet.connections() > was_there {
            0
        } else {
            failures + 1
        };
        match failures {
            0 => info!(%address, reason = %end, "worker gone"),
            1 => warn!(%address, reason = %end, "worker not reachable"),
            _ => debug!(%address, reason = %end, "worker still not reachable"),
        }
        sleep(pause(failures, config.reconnect, seams.entropy.u64())).await;
    }
}

/// Doubles with every failure up to a limit, with up to a quarter more at random.
fn pause(failures: u32, (first, most): (Duration, Duration), random: u64) -> Duration {
    let pause = first.saturating_mul(1 << failures.min(16)).min(most);
    pause + pause.mul_f64((random % 1024) as f64 / 4096.0)
}

async fn session(address: &str, fleet: &Arc<Fleet>, config: FleetConfig, seams: &Seams) -> End {
    let opened = timeout(config.answer, async {
        let io = (seams.dial)(address.to_string()).await.map_err(End::Dial)?;
        Ok::<_, End>(Channel::open(io, config.keepalive()).await?)
    });
    let (channel, driver) = match opened.await {
        Ok(Ok(opened)) => opened,
        Ok(Err(end)) => return end,
        Err(_) => return End::Late("connect"),
    };
    tokio::select! {
        biased;
        status = driver.run() => End::Call(status),
        end = follow(address, channel, fleet, config) => match end {
            Ok(()) => End::Left,
            Err(end) => end,
        },
    }
}

async fn follow(
    address: &str,
    channel: Channel,
    fleet: &Arc<Fleet>,
    config: FleetConfig,
) -> Result<(), End> {
    let origin = http::Uri::builder()
        .scheme("http")
        .authority(address)
        .path_and_query("/")
        .build()
        .map_err(|_| End::Address(address.into()))?;
    let mut client = WorkerClient::with_origin(channel.clone(), origin.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let facts = timeout(config.answer, client.describe(DescribeRequest {})).await;
    let facts = facts.map_err(|_| End::Late("describe"))??.into_inner();
    let worker = Worker::new(
        address.into(),
        facts,
        channel,
        origin,
        config.breaker,
        &fleet.tallies,
    )?;
    let watch = timeout(config.answer, async {
        let mut watch = client.watch(WatchRequest {}).await?.into_inner();
        let first = next(&mut watch).await?;
        Ok::<_, End>((watch, first))
    });
    let (mut watch, first) = watch.await.map_err(|_| End::Late("watch"))??;
    worker.update(&first);
    let worker = fleet.join(worker);
    let mut sequence = first.sequence;
    loop {
        let message = next(&mut watch).await?;
        sequence += 1;
        if message.sequence != sequence {
            return Err(End::Gap {
                expected: sequence,
                got: message.sequence,
            });
        }
        worker.update(&message);
        fleet.changed();
    }
}

async fn next(watch: &mut Streaming<WatchResponse>) -> Result<WatchResponse, End> {
    watch.message().await?.ok_or(End::Left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_grows_to_its_limit() {
        let limits = (Duration::from_millis(50), Duration::from_secs(2));
        assert_eq!(pause(0, limits, 0), Duration::from_millis(50));
        assert_eq!(pause(3, limits, 0), Duration::from_millis(400));
        assert_eq!(pause(40, limits, 0), Duration::from_secs(2));
        assert!(pause(40, limits, 1023) < Duration::from_millis(2500));
    }
}
