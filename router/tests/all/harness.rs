//! A router with fake workers.

use std::{path::PathBuf, sync::Arc, time::Duration};

use proto::v1::{FinishReason, Role, Stop};
use router::{
    Common, Config, Incoming, discovery,
    seams::{BoxIo, Entropy, Seams},
    serve,
};
use telemetry::metrics::Metrics;
use testkit::{
    fake_worker::{FakeWorker, Options, Script},
    network::Network,
};
use text::Text;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::client::{Client, Events, Reply};

/// A running router, its workers and its network.
pub(crate) struct Harness {
    pub(crate) network: Network,
    pub(crate) prefill: Vec<FakeWorker>,
    pub(crate) decode: Vec<FakeWorker>,
    pub(crate) text: Arc<Text>,
    stop: CancellationToken,
    router: JoinHandle<()>,
}

/// What to start.
pub(crate) struct Setup {
    pub(crate) prefill: Vec<Options>,
    pub(crate) decode: Vec<Options>,
    pub(crate) config: Config,
}

impl Default for Setup {
    fn default() -> Self {
        Self::of(2, 2)
    }
}

impl Setup {
    pub(crate) fn of(prefill: usize, decode: usize) -> Self {
        let options = |role, name: &str, count| {
            (0..count)
                .map(|i| Options::instant(role, &format!("{name}-{i}")))
                .collect()
        };
        Self {
            prefill: options(Role::Prefill, "prefill", prefill),
            decode: options(Role::Decode, "decode", decode),
            config: Config::new("m"),
        }
    }

    /// Decode workers that take their time.
    pub(crate) fn paced(mut self, pace: Duration) -> Self {
        for options in &mut self.decode {
            options.pace = Some(pace);
        }
        self
    }

    /// Starts everything and waits until every worker is known.
    pub(crate) async fn start(self) -> Harness {
        let network = Network::new();
        let start = |options: Vec<Options>| -> Vec<FakeWorker> {
            let start = |options: Options| {
                FakeWorker::start(&network, &options.incarnation.clone(), options)
            };
            options.into_iter().map(start).collect()
        };
        let workers = self.prefill.iter().chain(&self.decode);
        let addresses: Vec<String> = workers.map(|options| options.incarnation.clone()).collect();
        let (prefill, decode) = (start(self.prefill), start(self.decode));
        let stop = CancellationToken::new();
        let incoming = Incoming {
            http: network.listen("router:http", CancellationToken::new()),
            grpc: network.listen("router:grpc", CancellationToken::new()),
        };
        let fixtures =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../crates/text/tests/fixtures");
        let text = Arc::new(Text::load(&fixtures).unwrap());
        let count = addresses.len();
        let common = Common::new(&self.config, Metrics::new(&[]).unwrap()).unwrap();
        let serving = serve(
            self.config,
            Arc::clone(&text),
            discovery::fixed(addresses),
            incoming,
            seams(&network),
            common,
            stop.clone(),
        );
        let router = tokio::spawn(async move { serving.await.unwrap() });
        let harness = Harness {
            network,
            prefill,
            decode,
            text,
            stop,
            router,
        };
        harness.wait_for_workers(count).await;
        harness
    }
}

fn seams(network: &Network) -> Seams {
    let network = network.clone();
    Seams {
        dial: Arc::new(move |address| {
            let network = network.clone();
            Box::pin(async move { Ok(Box::pin(network.dial(&address).await?) as BoxIo) })
        }),
        entropy: Entropy::seeded(1),
        unix_time: Arc::new(|| 1_700_000_000),
    }
}

impl Harness {
    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.network).await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Reply {
        self.client().await.post(path, body).await
    }

    /// Starts a streamed completion of token ids, with its usage at the end.
    pub(crate) async fn stream(&self, prompt: &[u32], max_tokens: u32) -> Events {
        let streamed = r#","stream":true,"stream_options":{"include_usage":true}"#;
        let body = completion(prompt, max_tokens, streamed);
        self.client().await.stream("/v1/completions", &body).await
    }

    /// A series of `/metrics`, 0 while it is not there.
    pub(crate) async fn metric(&self, series: &str) -> u64 {
        let text = self.client().await.get("/metrics").await.body;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }

    pub(crate) async fn wait_for_workers(&self, count: usize) {
        eventually(async || {
            let mut known = 0;
            for role in ["prefill", "decode", "combined"] {
                let series = format!(r#"hadal_router_workers{{role="{role}",state="ready"}}"#);
                known += self.metric(&series).await;
            }
            known == count as u64
        })
        .await;
    }

    /// Waits until no worker holds anything.
    pub(crate) async fn wait_for_quiet(&self) {
        eventually(async || {
            self.workers().all(|worker| {
                let counts = worker.counts();
                (counts.leases, counts.prefilling, counts.generating) == (0, 0, 0)
            })
        })
        .await;
    }

    pub(crate) fn workers(&self) -> impl Iterator<Item = &FakeWorker> {
        self.prefill.iter().chain(&self.decode)
    }

    /// What a prompt of ids is answered with, as text.
    pub(crate) fn expected(&self, prompt: &[u32], max_tokens: u32) -> String {
        let script = Script {
            alphabet: (30..90).collect(),
            length: 1 << 20,
        };
        let stop = Stop {
            token_ids: vec![1],
            max_tokens,
            min_tokens: 0,
        };
        let (ids, reason) = script.answer(prompt, &stop);
        assert_eq!(reason, FinishReason::Length);
        let bytes = ids
            .iter()
            .flat_map(|id| self.text.tokenizer().token_bytes(*id));
        String::from_utf8(bytes.copied().collect()).unwrap()
    }

    /// Stops the router and waits until it is gone.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(60), self.router)
            .await
            .unwrap()
            .unwrap();
    }

    pub(crate) fn begin_stop(&self) {
        self.stop.cancel();
    }
}

/// Waits until `is_true`, at most a minute of simulated time.
pub(crate) async fn eventually(is_true: impl AsyncFn() -> bool) {
    for _ in 0..6000 {
        if is_true().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    unreachable!("it did not become true in a minute");
}

/// A request for a completion of token ids.
pub(crate) fn completion(prompt: &[u32], max_tokens: u32, more: &str) -> String {
    format!(r#"{{"model":"m","prompt":{prompt:?},"max_tokens":{max_tokens}{more}}}"#)
}
