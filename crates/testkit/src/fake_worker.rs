//! Prefill and decode workers without a network inside: they answer the router's calls at once with tokens from a
//! [`Script`], check what they are asked, count what they hold, and fail on command.

mod services;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use proto::v1::{
    self, FinishReason, Role, Token, TokenLogprob, decode_server, prefill_server, worker_server,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    transport::{Server, server::Connected},
};

use crate::network::Network;

/// How long a worker computes with what kills it.
const DYING: Duration = Duration::from_millis(1);

/// Which tokens a prompt is answered with: a function of the prompt and the index alone, so that every worker gives the
/// same and a test can say what should come.
#[derive(Clone, Debug)]
pub struct Script {
    /// Ids to choose from.
    pub alphabet: Vec<u32>,
    /// Tokens before the answer ends by itself, if the request has a token to end it with.
    pub length: u32,
}

impl Script {
    /// The whole answer to a prompt, and how it ends.
    pub fn answer(&self, prompt: &[u32], stop: &v1::Stop) -> (Vec<u32>, FinishReason) {
        let seed = Self::seed(prompt);
        let mut answer: Vec<u32> = Vec::new();
        for index in 0..stop.max_tokens {
            let id = self.at(seed, index, stop);
            answer.push(id);
            if stop.token_ids.contains(&id) {
                return (answer, FinishReason::Stop);
            }
        }
        (answer, FinishReason::Length)
    }

    fn seed(prompt: &[u32]) -> u64 {
        prompt.iter().copied().fold(0xcbf2_9ce4_8422_2325, mix)
    }

    fn at(&self, seed: u64, index: u32, stop: &v1::Stop) -> u32 {
        match stop.token_ids.first() {
            Some(&end) if index >= self.length && index >= stop.min_tokens => end,
            _ => self.alphabet[(mix(seed, index) >> 20) as usize % self.alphabet.len()],
        }
    }
}

/// FNV-1a: any mixing will do.
fn mix(hash: u64, value: u32) -> u64 {
    (hash ^ u64::from(value)).wrapping_mul(0x0100_0000_01b3)
}

/// What a fake worker is.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its pool.
    pub role: Role,
    /// Differs for every life.
    pub incarnation: String,
    /// Only workers of one revision are paired.
    pub revision: String,
    /// What it answers.
    pub script: Script,
    /// Pause before each token; none sends all tokens at once.
    pub pace: Option<Duration>,
    /// Tokens of prompt and answer.
    pub max_model_len: u32,
}

impl Options {
    /// A worker that answers at once.
    pub fn instant(role: Role, incarnation: &str) -> Self {
        Self {
            role,
            incarnation: incarnation.into(),
            revision: "r1".into(),
            script: Script {
                alphabet: (30..90).collect(),
                length: 1 << 20,
            },
            pace: None,
            max_model_len: 4096,
        }
    }
}

/// What goes wrong with the next calls: each call takes one entry from its queue.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Of `Decode.Reserve`.
    pub reserve: VecDeque<Fault>,
    /// Of `Prefill.Run`.
    pub run: VecDeque<Fault>,
    /// Of `Decode.Generate`.
    pub generate: VecDeque<Fault>,
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Nothing: this call goes well.
    None,
    /// The call is refused.
    Refuse(Code),
    /// After so many messages nothing more comes.
    Hang(usize),
    /// After so many messages the stream ends, as if well.
    Break(usize),
    /// After so many messages the stream ends with an error.
    Fail(usize, Code),
    /// Before the call is taken the whole worker dies.
    DieUntaken,
    /// After so many messages the whole worker dies.
    Die(usize),
    /// After so many messages one is left out.
    Skip(usize),
    /// After so many messages one comes twice.
    Repeat(usize),
}

/// What a worker holds and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Leases that nobody gave back or used.
    pub leases: usize,
    /// Calls of `Prefill.Run` that run.
    pub prefilling: usize,
    /// Calls of `Decode.Generate` that run.
    pub generating: usize,
    /// Calls of `Prefill.Run` so far.
    pub prefills: usize,
    /// Calls of `Decode.Generate` so far.
    pub generations: usize,
}

/// A worker.
#[derive(Clone, Debug)]
pub struct FakeWorker(Arc<State>);

#[derive(Debug)]
struct State {
    options: Options,
    power: CancellationToken,
    held: Mutex<Held>,
    status: watch::Sender<Shown>,
}

#[derive(Debug, Default)]
struct Held {
    faults: Faults,
    counts: Counts,
    leases: BTreeSet<u64>,
    last_lease: u64,
    attempts: BTreeMap<String, u32>,
    deadlines_ms: Vec<u32>,
}

#[derive(Clone, Debug, Default)]
struct Shown {
    is_draining: bool,
    stored: Vec<u64>,
}

impl FakeWorker {
    /// Starts a worker at `address` of a network in memory.
    pub fn start(network: &Network, address: &str, options: Options) -> Self {
        let worker = Self::new(options);
        let incoming = network.listen(address, worker.0.power.clone());
        let serving = worker.clone().serve(incoming);
        tokio::spawn(async move {
            // Its connections broke: that is how a worker dies here.
            let _ = serving.await;
        });
        worker
    }

    /// A worker that is not served yet.
    pub fn new(options: Options) -> Self {
        let (power, status) = (
            CancellationToken::new(),
            watch::Sender::new(Shown::default()),
        );
        Self(Arc::new(State {
            options,
            power,
            held: Mutex::default(),
            status,
        }))
    }

    /// Serves on the connections of `incoming` until the worker is killed.
    ///
    /// # Errors
    /// When the listener breaks.
    pub async fn serve<IO>(
        self,
        incoming: impl Stream<Item = std::io::Result<IO>> + Send,
    ) -> Result<(), tonic::transport::Error>
    where
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let power = self.0.power.clone();
        let server = Server::builder()
            .add_service(worker_server::WorkerServer::new(self.clone()))
            .add_service(prefill_server::PrefillServer::new(self.clone()))
            .add_service(decode_server::DecodeServer::new(self))
            .serve_with_incoming(incoming);
        power.run_until_cancelled(server).await.unwrap_or(Ok(()))
    }

    /// Dies at once: every connection breaks.
    pub fn kill(&self) {
        self.0.power.cancel();
    }

    /// Whether it died.
    pub fn is_dead(&self) -> bool {
        self.0.power.is_cancelled()
    }

    /// Says that it leaves.
    pub fn drain(&self) {
        self.0.status.send_modify(|shown| shown.is_draining = true);
    }

    /// Says that its cache holds these blocks.
    pub fn store(&self, hashes: &[u64]) {
        self.0
            .status
            .send_modify(|shown| shown.stored.extend_from_slice(hashes));
    }

    /// What it holds and did.
    pub fn counts(&self) -> Counts {
        let held = self.0.held.lock();
        Counts {
            leases: held.leases.len(),
            ..held.counts
        }
    }

    /// Time limits that it was told, in milliseconds.
    pub fn deadlines_ms(&self) -> Vec<u32> {
        self.0.held.lock().deadlines_ms.clone()
    }

    /// Makes the next calls go wrong.
    pub fn set_faults(&self, faults: Faults) {
        self.0.held.lock().faults = faults;
    }

    /// What goes wrong with a call that is taken now.
    async fn take(&self, queue: fn(&mut Faults) -> &mut VecDeque<Fault>) -> Result<Fault, Status> {
        let fault = queue(&mut self.0.held.lock().faults).pop_front();
        match fault {
            Some(Fault::Refuse(code)) => Err(Status::new(code, "told to refuse")),
            Some(Fault::DieUntaken) => {
                self.kill();
                std::future::pending().await
            }
            fault => Ok(fault.unwrap_or(Fault::None)),
        }
    }

    /// Checks a sequence; gives the whole answer to its prompt as well.
    fn check(&self, sequence: Option<v1::Sequence>) -> Result<(v1::Sequence, Answer), Status> {
        let sequence = sequence.ok_or_else(|| Status::invalid_argument("no sequence"))?;
        let key = sequence
            .key
            .clone()
            .ok_or_else(|| Status::invalid_argument("no key"))?;
        let stop = sequence.stop.clone().unwrap_or_default();
        let (prompt, produced) = sequence
            .tokens
            .split_at_checked(sequence.prompt_tokens as usize)
            .ok_or_else(|| Status::invalid_argument("more prompt than tokens"))?;
        let answer = self.0.options.script.answer(prompt, &stop);
        if !answer.0.starts_with(produced) {
            return Err(Status::invalid_argument("these tokens were never given"));
        }
        let mut held = self.0.held.lock();
        held.deadlines_ms.push(sequence.deadline_ms);
        let newest = held.attempts.entry(key.request_id).or_insert(key.attempt);
        if key.attempt < *newest {
            return Err(Status::aborted("a newer attempt exists"));
        }
        *newest = key.attempt;
        Ok((sequence, answer))
    }

    fn token(sequence: &v1::Sequence, index: u32, token: u32) -> Token {
        let top = sequence
            .sampling
            .as_ref()
            .and_then(|sampling| sampling.top_logprobs);
        let alternatives = (0..top.unwrap_or(0)).map(|rank| TokenLogprob {
            token: token + rank,
            logprob: -0.5 - rank as f32,
        });
        Token {
            index,
            token,
            logprob: top.map(|_| -0.5),
            top_logprobs: alternatives.collect(),
        }
    }

    /// Plays `messages` with `fault`, at the worker's pace; counted by `count` as long as somebody listens.
    fn play<T: Clone + Send + 'static>(
        &self,
        messages: Vec<T>,
        fault: Fault,
        count: fn(&mut Counts) -> &mut usize,
        lease: u64,
    ) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
        let (messages, tail) = spoil(messages, fault);
        let guard = Guard::new(Arc::clone(&self.0), count, lease);
        let (pace, power) = (self.0.options.pace, self.0.power.clone());
        let played = stream::iter(messages).then(move |message| async move {
            if let Some(pace) = pace {
                tokio::time::sleep(pace).await;
            }
            Ok(message)
        });
        let tail = stream::once(async move {
            match tail {
                Tail::End => None,
                Tail::Error(code) => Some(Err(Status::new(code, "told to fail"))),
                Tail::Hang => std::future::pending().await,
                Tail::Death => {
                    // A worker dies while it computes, which takes time: what it said before went out.
                    tokio::time::sleep(DYING).await;
                    power.cancel();
                    std::future::pending().await
                }
            }
        });
        let tail = tail.filter_map(std::future::ready);
        let whole = played.chain(tail).map(move |message| {
            let _held = &guard;
            message
        });
        whole.boxed()
    }
}

enum Tail {
    End,
    Error(Code),
    Hang,
    Death,
}

fn spoil<T: Clone>(mut messages: Vec<T>, fault: Fault) -> (Vec<T>, Tail) {
    let tail = match fault {
        Fault::None | Fault::Refuse(_) | Fault::DieUntaken => return (messages, Tail::End),
        Fault::Skip(at) => {
            if at < messages.len() {
                messages.remove(at);
            }
            return (messages, Tail::End);
        }
        Fault::Repeat(at) => {
            if let Some(message) = messages.get(at).cloned() {
                messages.insert(at, message);
            }
            return (messages, Tail::End);
        }
        Fault::Hang(at) => (at, Tail::Hang),
        Fault::Break(at) => (at, Tail::End),
        Fault::Fail(at, code) => (at, Tail::Error(code)),
        Fault::Die(at) => (at, Tail::Death),
    };
    messages.truncate(tail.0);
    (messages, tail.1)
}

/// Counts a call while it runs; its lease ends with it.
struct Guard {
    state: Arc<State>,
    count: fn(&mut Counts) -> &mut usize,
    lease: u64,
}

impl Guard {
    fn new(state: Arc<State>, count: fn(&mut Counts) -> &mut usize, lease: u64) -> Self {
        *count(&mut state.held.lock().counts) += 1;
        Self {
            state,
            count,
            lease,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut held = self.state.held.lock();
        *(self.count)(&mut held.counts) -= 1;
        held.leases.remove(&self.lease);
    }
}

type Answer = (Vec<u32>, FinishReason);
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
