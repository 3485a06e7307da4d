//! Workers in one process over loopback, with engines whose answers are known and whose caches are checked wherever they
//! are read.

mod drain;
mod failures;
mod hand_off;
mod limits;
mod real;
mod reflection;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use engine::{Options, api::Engine};
use futures::StreamExt;
use kv::Usage;
use proto::v1::{
    self, decode_client::DecodeClient, decode_response, prefill_client::PrefillClient,
    run_response, worker_client::WorkerClient,
};
use telemetry::{health::Health, metrics::Metrics};
use testkit::{scripted::Scripted, toy::ToyConfig};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::mpsc,
    task::{AbortHandle, JoinHandle},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    transport::{Channel, server::TcpIncoming},
};

use crate::{Config, Ended, Error, Identity, Incoming, Outside, Role, serve};

/// How long anything in these tests may take.
const PATIENCE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(1);

/// One worker, on a runtime of its own: a process as far as the others can see.
struct Node {
    address: SocketAddr,
    kv: SocketAddr,
    engine: Arc<dyn Engine>,
    violations: mpsc::UnboundedReceiver<String>,
    metrics: Metrics,
    stop: CancellationToken,
    serving: JoinHandle<Result<Ended, Error>>,
    runtime: Option<Runtime>,
    /// Of a scripted engine.
    stepper: Option<AbortHandle>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Node {
    fn start(role: Role, incarnation: &str) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        Self::start_at(role, incarnation, Options::default(), any, any)
    }

    fn start_with(role: Role, incarnation: &str, options: Options) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        Self::start_at(role, incarnation, options, any, any)
    }

    fn start_at(
        role: Role,
        incarnation: &str,
        options: Options,
        address: SocketAddr,
        kv: SocketAddr,
    ) -> Self {
        let runtime = runtime();
        let scripted = Scripted::new(&ToyConfig::default(), options, STEP, true);
        let stepper = runtime.spawn(scripted.stepper.run());
        let mut node = Self::over(
            scripted.engine,
            scripted.violations,
            runtime,
            role,
            incarnation,
            address,
            kv,
        );
        node.stepper = Some(stepper.abort_handle());
        node
    }

    /// A worker whose engine has a thread of its own.
    fn start_real(role: Role, incarnation: &str, engine: Arc<dyn Engine>) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        let (_, none) = mpsc::unbounded_channel();
        Self::over(engine, none, runtime(), role, incarnation, any, any)
    }

    fn over(
        engine: Arc<dyn Engine>,
        violations: mpsc::UnboundedReceiver<String>,
        runtime: Runtime,
        role: Role,
        incarnation: &str,
        address: SocketAddr,
        kv: SocketAddr,
    ) -> Self {
        let inside = runtime.enter();
        let grpc = listen(address);
        let kv = listen(kv);
        let (address, kv_address) = (grpc.local_addr().unwrap(), kv.local_addr().unwrap());
        let config = Config {
            identity: Identity {
                deployment: "test".into(),
                role,
                unit: "0".into(),
                rank: 0,
                incarnation: incarnation.into(),
                revision: "toy".into(),
            },
            model: "toy".into(),
            precision: "f32".into(),
            kv_address: kv_address.to_string(),
            drain: PATIENCE,
        };
        let metrics = Metrics::new(&[]).unwrap();
        let outside = Outside {
            engine: Arc::clone(&engine),
            dial: transfer::tcp(),
            metrics: metrics.clone(),
            health: Health::new(),
        };
        let incoming = |listener| TcpIncoming::from(listener).with_nodelay(Some(true));
        let incoming = Incoming {
            grpc: incoming(grpc),
            kv: incoming(kv),
        };
        let stop = CancellationToken::new();
        let serving = runtime.spawn(serve(config, outside, incoming, stop.clone()));
        drop(inside);
        Self {
            address,
            kv: kv_address,
            engine,
            violations,
            metrics,
            stop,
            serving,
            runtime: Some(runtime),
            stepper: None,
        }
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address))
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    async fn decode(&self) -> DecodeClient<Channel> {
        DecodeClient::new(self.channel().await)
    }

    async fn prefill(&self) -> PrefillClient<Channel> {
        PrefillClient::new(self.channel().await)
    }

    async fn worker(&self) -> WorkerClient<Channel> {
        WorkerClient::new(self.channel().await)
    }

    fn usage(&self) -> Usage {
        self.engine.pool().check_integrity().unwrap()
    }

    /// Waits until no sequence and no lease holds a block.
    async fn settled(&self) {
        let held = || {
            let usage = self.usage();
            usage.used + usage.quarantined
        };
        let settle = async {
            while held() > 0 {
                tokio::time::sleep(STEP).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, settle).await;
        assert!(
            in_time.is_ok(),
            "blocks did not come back: {:?}",
            self.usage()
        );
    }

    /// As `kill -9` does: every connection and task is gone at once, and the listeners with them.
    async fn kill(mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
    }

    async fn stop(mut self) -> Ended {
        self.stop.cancel();
        let ended = self.ended().await;
        assert_eq!(self.violations.try_recv().ok(), None, "wrong KV was used");
        ended
    }

    async fn ended(&mut self) -> Ended {
        let ended = tokio::time::timeout(PATIENCE, &mut self.serving)
            .await
            .unwrap();
        ended.unwrap().unwrap()
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// To be called inside the runtime that will serve it.
fn listen(address: SocketAddr) -> TcpListener {
    let listener = std::net::TcpListener::bind(address).unwrap();
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

fn greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    ToyConfig::default().greedy(prompt, count)
}

/// A prompt that no other test's shares a block with.
fn prompt(salt: u32, len: u32) -> Vec<u32> {
    (0..len)
        .map(|i| (i * 7 + salt * 13 + i / 64) % 300)
        .collect()
}

fn key(request: &str, attempt: u32) -> v1::RequestKey {
    v1::RequestKey {
        request_id: request.into(),
        attempt,
    }
}

fn sequence(request: &str, prompt: &[u32], produced: &[u32], max_tokens: u32) -> v1::Sequence {
    v1::Sequence {
        key: Some(key(request, 0)),
        tokens: [prompt, produced].concat(),
        prompt_tokens: prompt.len() as u32,
        stop: Some(v1::Stop {
            max_tokens,
            ..v1::Stop::default()
        }),
        deadline_ms: PATIENCE.as_millis() as u32,
        ..v1::Sequence::default()
    }
}

async fn reserve(
    node: &Node,
    request: &str,
    prompt: &[u32],
) -> Result<v1::ReserveResponse, Status> {
    let reserve = v1::ReserveRequest {
        prompt_tokens: 0,
        key: Some(key(request, 0)),
        tokens: prompt.to_vec(),
        kv_fingerprint: node.engine.format().fingerprint().to_vec(),
        deadline_ms: PATIENCE.as_millis() as u32,
        cache_salt: vec![],
    };
    Ok(node.decode().await.reserve(reserve).await?.into_inner())
}

fn target(node: &Node, reserved: &v1::ReserveResponse) -> v1::TransferTarget {
    v1::TransferTarget {
        kv_address: node.kv.to_string(),
        incarnation: reserved.incarnation.clone(),
        lease: reserved.lease,
        first_block: reserved.cached_blocks,
    }
}

async fn run(
    prefill: &Node,
    sequence: v1::Sequence,
    target: v1::TransferTarget,
) -> Result<Streaming<v1::RunResponse>, Status> {
    let request = v1::RunRequest {
        sequence: Some(sequence),
        target: Some(target),
    };
    Ok(prefill.prefill().await.run(request).await?.into_inner())
}

/// The first token and the end of a prefill.
async fn finish_run(
    mut stream: Streaming<v1::RunResponse>,
) -> Result<(u32, v1::PrefillDone), Status> {
    let mut first = None;
    while let Some(response) = stream.message().await? {
        match response.event.unwrap() {
            run_response::Event::Token(token) => {
                assert_eq!((first.replace(token.token), token.index), (None, 0));
            }
            run_response::Event::Done(done) => return Ok((first.unwrap(), done)),
        }
    }
    panic!("the stream ended without an end")
}

async fn generate(
    decode: &Node,
    sequence: v1::Sequence,
    reserved: Option<&v1::ReserveResponse>,
) -> Result<Streaming<v1::DecodeResponse>, Status> {
    let request = v1::DecodeRequest {
        sequence: Some(sequence),
        lease: reserved.map_or(0, |reserved| reserved.lease),
        incarnation: reserved.map_or_else(String::new, |reserved| reserved.incarnation.clone()),
    };
    Ok(decode.decode().await.generate(request).await?.into_inner())
}

/// All tokens of a generation, in order from `first_index`, and its end.
async fn finish_generate(
    stream: Streaming<v1::DecodeResponse>,
    first_index: u32,
) -> Result<(Vec<u32>, v1::Finished), Status> {
    let mut tokens = vec![];
    let mut stream = stream;
    while let Some(response) = stream.next().await {
        match response?.event.unwrap() {
            decode_response::Event::Token(token) => {
                assert_eq!(token.index, first_index + tokens.len() as u32);
                tokens.push(token.token);
            }
            decode_response::Event::Finished(finished) => {
                assert!(
                    stream.message().await?.is_none(),
                    "something came after the end"
                );
                return Ok((tokens, finished));
            }
            decode_response::Event::Committed(_) => assert!(tokens.is_empty()),
            decode_response::Event::PromptLogprobs(_) => {}
        }
    }
    panic!("the stream ended without an end")
}

/// A whole request through both pools.
async fn hand_off(
    prefill: &Node,
    decode: &Node,
    request: &str,
    prompt: &[u32],
    max_tokens: u32,
) -> Result<(Vec<u32>, v1::PrefillDone, v1::Finished), Status> {
    let reserved = reserve(decode, request, prompt).await?;
    let stream = run(
        prefill,
        sequence(request, prompt, &[], max_tokens),
        target(decode, &reserved),
    )
    .await?;
    let (first, done) = finish_run(stream).await?;
    let stream = generate(
        decode,
        sequence(request, prompt, &[first], max_tokens),
        Some(&reserved),
    )
    .await?;
    let (rest, finished) = finish_generate(stream, 1).await?;
    Ok(([vec![first], rest].concat(), done, finished))
}
