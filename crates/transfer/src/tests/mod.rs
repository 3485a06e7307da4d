//! A receiver and a sender over loopback, and what they share: a cache in host memory and blocks that say when they
//! come back.

mod interop;
mod loopback;
mod mutations;

use std::{
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use kernels::BlockMemory;
use parking_lot::Mutex;
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    Channels, FRAME_BYTES, Geometry, Identity, Key, KvTransferServer, Observer, Plan, Report,
    Reserved, Settings, Source, Sums, Transfer, protocol::Ended, protocol::Refusal,
    protocol::Watermarks, push, push::Error,
};

/// Blocks of host memory.
#[derive(Debug)]
struct Memory {
    block_bytes: usize,
    blocks: Vec<Mutex<Vec<u8>>>,
}

impl Memory {
    fn new(blocks: usize, block_bytes: usize, fill: impl Fn(usize, usize) -> u8) -> Arc<Self> {
        let block = |b| Mutex::new((0..block_bytes).map(|i| fill(b, i)).collect());
        Arc::new(Self {
            block_bytes,
            blocks: (0..blocks).map(block).collect(),
        })
    }

    fn bytes(&self, block: u32) -> Vec<u8> {
        self.blocks[block as usize].lock().clone()
    }
}

impl BlockMemory for Memory {
    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn read(
        &self,
        block: usize,
        bytes: Range<usize>,
        read: &mut dyn FnMut(&[u8]),
    ) -> kernels::Result<()> {
        read(&self.blocks[block].lock()[bytes]);
        Ok(())
    }

    fn write(
        &self,
        block: usize,
        bytes: Range<usize>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> kernels::Result<()> {
        write(&mut self.blocks[block].lock()[bytes]);
        Ok(())
    }
}

/// Reserved blocks; counts those that are out.
#[derive(Debug)]
struct Blocks(Vec<u32>, Arc<AtomicUsize>);

impl Blocks {
    fn take(ids: Vec<u32>, out: &Arc<AtomicUsize>) -> Self {
        out.fetch_add(ids.len(), Ordering::SeqCst);
        Self(ids, Arc::clone(out))
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.1.fetch_sub(self.0.len(), Ordering::SeqCst);
    }
}

impl Reserved for Blocks {
    fn ids(&self) -> Vec<u32> {
        self.0.clone()
    }
}

/// Knows no checksums.
struct NoSums;

impl Sums for NoSums {
    fn get(&self, _: u32, _: u32, _: u32) -> Option<u64> {
        None
    }
    fn put(&self, _: u32, _: u32, _: u32, _: u64) {}
}

struct Quiet;

impl Observer for Quiet {
    fn received(&self, _: u64) {}
    fn ended(&self, _: Ended) {}
    fn refused(&self, _: Refusal) {}
}

const GEOMETRY: Geometry = Geometry {
    layers: 3,
    block_tokens: 8,
    token_bytes: 16,
};
const TTL: Duration = Duration::from_secs(30);

/// 20 tokens: two full blocks and a partial one.
fn plan() -> Plan {
    Plan {
        geometry: GEOMETRY,
        first_block: 0,
        total_tokens: 20,
    }
}

fn key() -> Key {
    Key {
        request: "request-1".into(),
        attempt: 1,
    }
}

/// A receiver of 16 blocks, and where it listens.
struct There {
    memory: Arc<Memory>,
    receiver: crate::Receiver<Blocks>,
    out: Arc<AtomicUsize>,
    address: SocketAddr,
    tasks: JoinSet<()>,
}

const FINGERPRINT: &[u8] = b"bf16/3/8/8";
/// Blocks of the receiver's cache that the tests reserve, deliberately not in order.
const THERE: [u32; 3] = [11, 4, 7];

impl There {
    async fn start(incarnation: &str) -> Self {
        Self::start_at(incarnation, "127.0.0.1:0".parse().unwrap()).await
    }

    async fn start_at(incarnation: &str, address: SocketAddr) -> Self {
        let memory = Memory::new(16, GEOMETRY.block_bytes(), |_, _| 0xEE);
        let settings = Settings::new(incarnation.into(), FINGERPRINT.to_vec(), GEOMETRY);
        let receiver = crate::Receiver::new(settings, Arc::clone(&memory) as _, Arc::new(Quiet));
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let serve = Server::builder()
            .max_frame_size(FRAME_BYTES)
            .add_service(KvTransferServer::new(receiver.clone()))
            .serve_with_incoming(incoming);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { serve.await.unwrap() });
        Self {
            memory,
            receiver,
            out: Arc::default(),
            address,
            tasks,
        }
    }

    fn reserve(&self) -> u64 {
        let blocks = Blocks::take(THERE.to_vec(), &self.out);
        self.receiver.reserve(key(), plan(), TTL, blocks).unwrap()
    }

    fn identity(&self, lease: u64) -> Identity {
        Identity {
            key: key(),
            lease,
            receiver: self.receiver.settings().incarnation.clone(),
            sender: "sender-life".into(),
            fingerprint: FINGERPRINT.to_vec(),
            plan: plan(),
        }
    }

    fn out(&self) -> usize {
        self.out.load(Ordering::SeqCst)
    }

    async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// The sender's cache: every byte differs from its neighbours.
struct Here {
    memory: Arc<Memory>,
    filled: watch::Sender<Watermarks>,
}

const HERE: [u32; 3] = [2, 0, 5];

impl Here {
    fn new() -> Self {
        let memory = Memory::new(8, GEOMETRY.block_bytes(), |b, i| {
            (b * 89 + i * 7 + i / 251) as u8
        });
        Self {
            memory,
            filled: watch::Sender::new(Watermarks::new(GEOMETRY.layers)),
        }
    }

    fn full() -> Self {
        let here = Self::new();
        here.fill(0..3, 20);
        here
    }

    fn fill(&self, layers: Range<usize>, end: u32) {
        self.filled.send_modify(|marks| marks.raise(layers, end));
    }

    fn source(&self) -> Source {
        Source {
            memory: Arc::clone(&self.memory) as _,
            sums: Arc::new(NoSums),
            ids: HERE.to_vec(),
            owner: Arc::new(()),
        }
    }

    fn transfer(&self, address: &str, identity: Identity) -> Transfer {
        Transfer {
            address: address.to_owned(),
            identity,
            source: self.source(),
            filled: self.filled.subscribe(),
            headers: http::HeaderMap::new(),
            deadline: Instant::now() + Duration::from_secs(20),
            sent: Arc::new(|_| {}),
        }
    }

    async fn push_to(&self, address: &str, identity: Identity) -> Result<Report, Error> {
        let channel = Channels::new(crate::tcp()).get(address).unwrap();
        push(channel, self.transfer(address, identity)).await
    }

    async fn push(&self, there: &There, lease: u64) -> Result<Report, Error> {
        self.push_to(&there.address.to_string(), there.identity(lease))
            .await
    }

    /// Every valid token of every layer is over there, and nothing else was touched.
    fn assert_arrived(&self, there: &There) {
        let plan = plan();
        for block in plan.blocks() {
            let sent = self.memory.bytes(HERE[block as usize]);
            let received = there.memory.bytes(THERE[block as usize]);
            let valid = plan.tokens(block) as usize * GEOMETRY.token_bytes as usize;
            let layers = sent
                .chunks(GEOMETRY.layer_bytes())
                .zip(received.chunks(GEOMETRY.layer_bytes()));
            for (sent, received) in layers {
                assert_eq!(sent[..valid], received[..valid]);
                assert!(
                    received[valid..].iter().all(|byte| *byte == 0xEE),
                    "wrote behind the end"
                );
            }
        }
        for block in (0..16).filter(|block| !THERE.contains(block)) {
            assert!(there.memory.bytes(block).iter().all(|byte| *byte == 0xEE));
        }
    }
}
