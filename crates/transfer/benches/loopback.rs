//! KV transfer over loopback gRPC against a plain TCP stream that does the same copy.
//!
//! `cargo bench -p transfer [-- ROUNDS]`: rounds are interleaved in one run, so that the ratios survive a noisy machine.
//! Both ends have a thread and a cache of their own, with blocks of DeepSeek-V3's shape; the bytes start in the sender's
//! cache (cold: the caches are larger than the processor's) and end in the receiver's.

use std::{
    error::Error,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use kernels::{Backend, BlockMemory, Cpu, DType};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
};
use tonic::transport::{Server, server::TcpIncoming};
use transfer::{
    Channels, FRAME_BYTES, Geometry, Identity, Key, KvTransferServer, Observer, PIECE_BYTES, Plan,
    Receiver, Reserved, Settings, Source, Sums, Transfer, checksum,
    protocol::{Ended, Refusal, Watermarks},
    push,
};

// What the workers use: glibc maps and unmaps every frame's buffer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// DeepSeek-V3 with its MTP layer in BF16.
const GEOMETRY: Geometry = Geometry {
    layers: 62,
    block_tokens: 64,
    token_bytes: 576 * 2,
};
const BLOCKS: u32 = 64;
const TTL: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What is measured, by name.
type Variant<'a> = (&'a str, Box<dyn Fn() -> Result<Duration> + 'a>);

fn main() -> Result<()> {
    if !std::env::args().any(|arg| arg == "--bench") {
        // A test run that builds all targets: nothing to measure.
        return Ok(());
    }
    let rounds = std::env::args()
        .skip(1)
        .find_map(|arg| arg.parse().ok())
        .unwrap_or(9);
    let source = cache()?;
    let known = Known::of(&*source)?;
    let raw = Raw::start(cache()?)?;
    let grpc = Grpc::start(cache()?)?;

    let none: Arc<dyn Sums> = Arc::new(Unknown);
    let known: Arc<dyn Sums> = Arc::new(known);
    let variants: Vec<Variant<'_>> = vec![
        ("plain TCP, no checksums", Box::new(|| raw.run(&*source))),
        (
            "gRPC, checksums stored when the block was filled",
            Box::new(|| grpc.run(&source, &known)),
        ),
        (
            "gRPC, checksums computed while sending",
            Box::new(|| grpc.run(&source, &none)),
        ),
    ];
    let mut times = vec![Vec::new(); variants.len()];
    let mut work = vec![Duration::ZERO; variants.len()];
    for round in 0..=rounds {
        for (i, (_, run)) in variants.iter().enumerate() {
            let before = computed()?;
            let took = run()?;
            // The first round warms both ends up.
            if round > 0 {
                times[i].push(took);
                work[i] += computed()?.saturating_sub(before);
            }
        }
    }
    let bytes = f64::from(BLOCKS) * GEOMETRY.block_bytes() as f64;
    let median = |times: &[Duration]| {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        sorted[sorted.len() / 2].as_secs_f64()
    };
    println!(
        "{:.0} MiB a run, median of {rounds} interleaved rounds",
        bytes / 1_048_576.0
    );
    for (i, (name, _)) in variants.iter().enumerate() {
        let these = &times[i];
        let mut ratios: Vec<f64> = these
            .iter()
            .zip(&times[0])
            .map(|(t, raw)| raw.as_secs_f64() / t.as_secs_f64())
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let (low, high) = (ratios[0], ratios[ratios.len() - 1]);
        println!(
            "{name:<50} {:5.2} GB/s  ratio {:.2} ({low:.2} to {high:.2})  {:.3} CPU s/GB",
            bytes / median(these) / 1e9,
            ratios[ratios.len() / 2],
            work[i].as_secs_f64() / (bytes * these.len() as f64) * 1e9,
        );
    }
    Ok(())
}

/// Processor time of all threads of this process so far: both ends, the system's part included.
fn computed() -> Result<Duration> {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        nanos += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// A cache whose every page was written.
fn cache() -> Result<Arc<dyn BlockMemory>> {
    let cache = Cpu::new(1).cache(BLOCKS as usize, GEOMETRY.layers as usize, 576, DType::Bf16)?;
    for block in 0..BLOCKS as usize {
        cache.write(block, 0..GEOMETRY.block_bytes(), &mut |bytes| {
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = (i * 31 + block) as u8;
            }
        })?;
    }
    Ok(Arc::new(cache))
}

/// Checksums of the whole cache.
struct Known(Vec<u64>);

impl Known {
    fn of(memory: &dyn BlockMemory) -> Result<Self> {
        let mut sums = Vec::new();
        for block in 0..BLOCKS as usize {
            memory.read(block, 0..GEOMETRY.block_bytes(), &mut |bytes| {
                sums.extend(bytes.chunks(GEOMETRY.layer_bytes()).map(checksum::layer));
            })?;
        }
        Ok(Self(sums))
    }
}

impl Sums for Known {
    fn get(&self, block: u32, layer: u32, _: u32) -> Option<u64> {
        self.0
            .get((block * GEOMETRY.layers + layer) as usize)
            .copied()
    }
    fn put(&self, _: u32, _: u32, _: u32, _: u64) {}
}

struct Unknown;

impl Sums for Unknown {
    fn get(&self, _: u32, _: u32, _: u32) -> Option<u64> {
        None
    }
    fn put(&self, _: u32, _: u32, _: u32, _: u64) {}
}

/// A plain TCP stream: a MiB a read, then a copy to the cache; a byte of acknowledgement at the end.
struct Raw {
    stream: TcpStream,
}

impl Raw {
    fn start(memory: Arc<dyn BlockMemory>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        stream.set_nodelay(true)?;
        let (accepted, _) = listener.accept()?;
        // Ends with the process.
        std::thread::spawn(move || receive(accepted, &*memory).map_err(|e| eprintln!("raw: {e}")));
        Ok(Self { stream })
    }

    fn run(&self, source: &dyn BlockMemory) -> Result<Duration> {
        let start = Instant::now();
        let mut stream = &self.stream;
        let mut result = Ok(());
        for block in 0..BLOCKS as usize {
            source.read(block, 0..GEOMETRY.block_bytes(), &mut |bytes| {
                for chunk in bytes.chunks(1 << 20) {
                    if result.is_ok() {
                        result = stream.write_all(chunk);
                    }
                }
            })?;
        }
        result?;
        stream.read_exact(&mut [0])?;
        Ok(start.elapsed())
    }
}

fn receive(mut stream: TcpStream, memory: &dyn BlockMemory) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        for block in 0..BLOCKS as usize {
            let mut placed = 0;
            while placed < GEOMETRY.block_bytes() {
                let most = buffer.len().min(GEOMETRY.block_bytes() - placed);
                let read = stream.read(&mut buffer[..most])?;
                if read == 0 {
                    return Ok(());
                }
                memory.write(block, placed..placed + read, &mut |to| {
                    to.copy_from_slice(&buffer[..read]);
                })?;
                placed += read;
            }
        }
        stream.write_all(&[1])?;
    }
}

struct Blocks;

impl Reserved for Blocks {
    fn ids(&self) -> Vec<u32> {
        (0..BLOCKS).collect()
    }
}

struct Quiet;

impl Observer for Quiet {
    fn received(&self, _: u64) {}
    fn ended(&self, _: Ended) {}
    fn refused(&self, _: Refusal) {}
}

struct Grpc {
    receiver: Receiver<Blocks>,
    address: SocketAddr,
    channels: Channels,
    here: Runtime,
    /// The receiver's own thread.
    _there: Runtime,
}

impl Grpc {
    fn start(memory: Arc<dyn BlockMemory>) -> Result<Self> {
        let there = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let here = Builder::new_current_thread().enable_all().build()?;
        let settings = Settings::new("receiver".into(), vec![1], GEOMETRY);
        let receiver = Receiver::new(settings, memory, Arc::new(Quiet));
        let incoming = {
            let _inside = there.enter();
            TcpIncoming::bind("127.0.0.1:0".parse()?)?.with_nodelay(Some(true))
        };
        let address = incoming.local_addr()?;
        let server = Server::builder()
            .max_frame_size(FRAME_BYTES)
            .add_service(KvTransferServer::new(receiver.clone()))
            .serve_with_incoming(incoming);
        there.spawn(server);
        let channels = Channels::new(transfer::tcp());
        Ok(Self {
            receiver,
            address,
            channels,
            here,
            _there: there,
        })
    }

    fn run(&self, source: &Arc<dyn BlockMemory>, sums: &Arc<dyn Sums>) -> Result<Duration> {
        let plan = Plan {
            geometry: GEOMETRY,
            first_block: 0,
            total_tokens: BLOCKS * GEOMETRY.block_tokens,
        };
        let key = Key {
            request: "benchmark".into(),
            attempt: 0,
        };
        let mut filled = Watermarks::new(GEOMETRY.layers);
        filled.raise(0..GEOMETRY.layers as usize, plan.total_tokens);
        self.here.block_on(async {
            let lease = self.receiver.reserve(key.clone(), plan, TTL, Blocks)?;
            let mut claim = self.receiver.claim(lease, &key)?;
            let address = self.address.to_string();
            let channel = self.channels.get(&address)?;
            let identity = Identity {
                key,
                lease,
                receiver: "receiver".into(),
                sender: "sender".into(),
                fingerprint: vec![1],
                plan,
            };
            let source = Source {
                memory: Arc::clone(source),
                sums: Arc::clone(sums),
                ids: (0..BLOCKS).collect(),
                owner: Arc::new(()),
            };
            let filled = watch::Sender::new(filled);
            let start = Instant::now();
            let report = push(
                channel,
                Transfer {
                    address,
                    identity,
                    source,
                    filled: filled.subscribe(),
                    headers: http::HeaderMap::new(),
                    deadline: tokio::time::Instant::now() + TTL,
                    sent: Arc::new(|_| {}),
                },
            )
            .await?;
            let took = start.elapsed();
            claim.sealed().await?;
            claim.commit()?;
            assert_eq!((report.bytes, report.streams), (plan.bytes(), 1));
            Ok(took)
        })
    }
}

const _: () =
    assert!(PIECE_BYTES >= GEOMETRY.block_tokens as usize * GEOMETRY.token_bytes as usize);
