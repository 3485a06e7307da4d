//! From a request to its events: check, render and tokenise, admit, run, turn tokens into text. The HTTP and the gRPC
//! front are both thin layers over [`Pipeline::start`].

mod attempt;
mod choice;
mod lease;
pub(crate) mod request;
mod retry;
mod route;
mod sequence;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{
    Stream, StreamExt,
    stream::{self, SelectAll},
};
use http::HeaderValue;
use openai::ApiError;
use proto::v1::{FinishReason, Stop, Token};
use telemetry::shutdown::Tasks;
use text::{INLINE_BYTES, Piece, Text};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

pub(crate) use choice::Counts;
pub use retry::RetryConfig;
pub use route::Mode;

use crate::{
    admission::{Admission, AdmissionConfig, Permit, Ticket},
    fleet::Fleet,
    metrics::RouterMetrics,
    policy::Policy,
    seams::Seams,
    serve::Common,
};
use choice::Choice;
use request::{Ask, Input, Origin};
pub(crate) use retry::Budget;
use route::{Wish, choose};
use sequence::{Deaths, Sequence, Spec};

/// How long each step of a request may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// A whole request.
    pub request: Duration,
    /// An answer that needs no computing.
    pub answer: Duration,
    /// From handing a prompt to a worker to its first token, and from there to the second, besides computing.
    pub first_token: Duration,
    /// More of that for each prompt token that the worker still has to compute, of this and of other prompts. A worker
    /// that is gone is noticed by its connection; this is for one that is there and does nothing.
    pub prompt_token: Duration,
    /// Between two tokens.
    pub token: Duration,
    /// Waiting for a worker to come.
    pub no_worker: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(600),
            answer: Duration::from_secs(5),
            first_token: Duration::from_secs(60),
            prompt_token: Duration::from_millis(100),
            token: Duration::from_secs(30),
            no_worker: Duration::from_secs(10),
        }
    }
}

/// What the pipeline is told.
#[derive(Clone, Debug)]
pub struct PipelineConfig {
    /// Name of the model in requests.
    pub model: String,
    /// Most tokens of prompt and answer; 0 leaves it to the workers.
    pub max_model_len: u32,
    /// Longest input in bytes.
    pub max_input_bytes: usize,
    /// Whether prompts are computed apart.
    pub mode: Mode,
    /// How workers are chosen.
    pub policy: Policy,
    /// Limits on what runs and waits.
    pub admission: AdmissionConfig,
    /// Limits on time.
    pub timeouts: Timeouts,
    /// Limits on attempts.
    pub retry: RetryConfig,
}

impl PipelineConfig {
    /// The defaults for a model of this name.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            max_model_len: 0,
            max_input_bytes: 8 << 20,
            mode: Mode::default(),
            policy: Policy::default(),
            admission: AdmissionConfig::default(),
            timeouts: Timeouts::default(),
            retry: RetryConfig::default(),
        }
    }
}

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) config: PipelineConfig,
    pub(crate) text: Arc<Text>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) metrics: Arc<RouterMetrics>,
    pub(crate) seams: Seams,
    tasks: Tasks,
    /// Ends every request that still runs.
    cut: CancellationToken,
    admission: Arc<Admission>,
    budget: Arc<Budget>,
}

/// Starts requests.
#[derive(Clone)]
pub(crate) struct Pipeline(Arc<Shared>);

/// What happens to a request. Each choice has any number of deltas and exactly one end; an error ends the whole request.
#[derive(Debug)]
pub(crate) enum Event {
    /// One more token of an answer, and the text that became certain with it (often, not always, its own).
    Delta {
        choice: u32,
        piece: Piece,
        token: Token,
    },
    /// The end of an answer, with the token and text that ended it if a stop string did.
    Finished {
        choice: u32,
        piece: Piece,
        token: Option<Token>,
        reason: FinishReason,
        counts: Counts,
    },
}

type Events = Pin<Box<dyn Stream<Item = Result<Event, ApiError>> + Send>>;

/// A request on its way. Dropping it cancels everything that was started for it.
pub(crate) struct Generation {
    /// None once they were cut off.
    events: Option<Events>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Choices, prompt by prompt.
    pub(crate) choices: u32,
}

impl Stream for Generation {
    type Item = Result<Event, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(events) = &mut this.events else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(event) = events.as_mut().poll_next(cx) {
            return Poll::Ready(event);
        }
        ready!(this.cut.as_mut().poll(cx));
        this.events = None;
        let message = "The server is shutting down.";
        Poll::Ready(Some(Err(ApiError::unavailable(message, 1))))
    }
}

impl Pipeline {
    pub(crate) fn new(
        config: PipelineConfig,
        text: Arc<Text>,
        fleet: Arc<Fleet>,
        common: &Common,
        seams: Seams,
        tasks: Tasks,
        cut: CancellationToken,
    ) -> Self {
        Self(Arc::new(Shared {
            config,
            text,
            fleet,
            metrics: Arc::clone(&common.series),
            seams,
            tasks,
            cut,
            admission: Arc::clone(&common.admission),
            budget: Arc::clone(&common.budget),
        }))
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.0
    }

    /// Whether a request could be served now.
    pub(crate) fn can_serve(&self) -> bool {
        let config = &self.0.config;
        let wish = Wish {
            mode: config.mode,
            policy: config.policy,
            avoid: &[],
            tokens: &[],
            salt: &[],
        };
        choose(&self.0.fleet.workers(), &wish, 0, Instant::now()).is_ok()
    }

    /// Tokens of prompt and answer together, as the workers and the configuration allow; 0 while nobody knows.
    pub(crate) fn max_model_len(&self) -> u32 {
        let workers = self.0.fleet.workers();
        let lengths = workers.iter().map(|worker| worker.facts.max_model_len);
        lengths
            .chain([self.0.config.max_model_len])
            .filter(|length| *length > 0)
            .min()
            .unwrap_or(0)
    }

    /// Checks a request against the model.
    ///
    /// # Errors
    /// 404 for another model's name.
    pub(crate) fn check_model(&self, model: &str) -> Result<(), ApiError> {
        if model == self.0.config.model {
            Ok(())
        } else {
            Err(ApiError::model_not_found(model))
        }
    }

    /// Checks and tokenises a request and queues it. Its events come from the stream that is returned.
    ///
    /// # Errors
    /// 4xx for what is wrong with the request, 429 when the queue is full.
    pub(crate) async fn start(&self, ask: Ask, origin: &Origin) -> Result<Generation, ApiError> {
        let shared = &self.0;
        self.check_model(&ask.model)?;
        shared.budget.deposit();
        let bytes: usize = ask.inputs.iter().map(Input::bytes).sum();
        if bytes > shared.config.max_input_bytes {
            let message = format!(
                "The input has {bytes} bytes; {} are allowed.",
                shared.config.max_input_bytes
            );
            return Err(ApiError::invalid(ask.field, message));
        }
        let prompts = self.tokenise(&ask, bytes).await?;
        self.check_ids(&ask, &prompts)?;
        let choices = prompts.len() as u32 * ask.answers;
        let ticket = shared.admission.enter(choices, &shared.metrics)?;
        let deaths = Deaths::default();
        let mut answers = Vec::with_capacity(choices as usize);
        for prompt in prompts {
            shared.metrics.prompt_tokens.observe(prompt.len() as f64);
            let stop = self.limits(&ask, prompt.len())?;
            for _ in 0..ask.answers {
                let index = answers.len() as u32;
                let deaths = Arc::clone(&deaths);
                let spec = self.spec(&ask, origin, index, prompt.clone(), stop.clone(), deaths);
                let sequence = Sequence::new(Arc::clone(shared), spec);
                answers.push(Choice::new(
                    Arc::clone(shared),
                    index,
                    sequence,
                    ask.stop.clone(),
                    stop.token_ids.clone(),
                    origin.arrived,
                ));
            }
        }
        let run = Run::new(Arc::clone(shared), ticket, answers);
        Ok(Generation {
            events: Some(Box::pin(run.into_stream())),
            cut: Box::pin(shared.cut.clone().cancelled_owned()),
            choices,
        })
    }

    async fn tokenise(&self, ask: &Ask, bytes: usize) -> Result<Vec<Vec<u32>>, ApiError> {
        let (text, nonce, field) = (
            Arc::clone(&self.0.text),
            self.0.seams.entropy.u128(),
            ask.field,
        );
        if bytes <= INLINE_BYTES {
            return ask
                .inputs
                .iter()
                .map(|input| encode(&text, input, nonce, field))
                .collect();
        }
        let inputs = ask.inputs.clone();
        let encode = move || {
            inputs
                .iter()
                .map(|input| encode(&text, input, nonce, field))
                .collect()
        };
        let encoded = tokio::task::spawn_blocking(encode).await;
        encoded.unwrap_or_else(|_| Err(ApiError::internal("The prompt could not be tokenised.")))
    }

    /// Ids that clients sent must be in the vocabulary.
    fn check_ids(&self, ask: &Ask, prompts: &[Vec<u32>]) -> Result<(), ApiError> {
        let workers = self.0.fleet.workers();
        let sizes = workers.iter().map(|worker| worker.facts.vocab_size);
        let Some(size) = sizes.filter(|size| *size > 0).min() else {
            return Ok(());
        };
        let is_unknown = |id: &u32| *id >= size;
        for (input, ids) in ask.inputs.iter().zip(prompts) {
            if let (Input::Tokens(_), Some(id)) = (input, ids.iter().copied().find(is_unknown)) {
                let message = format!("Token id {id} is not in the vocabulary of {size} tokens.");
                return Err(ApiError::invalid(ask.field, message));
            }
        }
        Ok(())
    }

    /// When an answer to a prompt of so many tokens ends.
    fn limits(&self, ask: &Ask, prompt: usize) -> Result<Stop, ApiError> {
        let longest = self.max_model_len() as usize;
        let wanted = ask.max_tokens.unwrap_or(0) as usize;
        if prompt == 0 {
            return Err(ApiError::invalid(
                ask.field,
                format!("'{}' holds no tokens.", ask.field),
            ));
        }
        if longest > 0 && prompt + wanted.max(1) > longest {
            return Err(ApiError::too_long(ask.field, longest, prompt, wanted));
        }
        let room = if longest > 0 {
            longest - prompt
        } else {
            u32::MAX as usize
        };
        let max_tokens = if wanted > 0 { wanted } else { room };
        let stops = self.0.text.tokenizer().stops();
        Ok(Stop {
            token_ids: if ask.ignore_eos {
                Vec::new()
            } else {
                stops.to_vec()
            },
            max_tokens: max_tokens as u32,
            min_tokens: ask.min_tokens,
        })
    }

    fn spec(
        &self,
        ask: &Ask,
        origin: &Origin,
        index: u32,
        tokens: Vec<u32>,
        stop: Stop,
        deaths: Deaths,
    ) -> Spec {
        let shared = &self.0;
        let mut sampling = ask.sampling.rest.clone();
        let defaults = shared.text.sampling_defaults();
        sampling.temperature = Some(ask.sampling.temperature.unwrap_or(defaults.temperature));
        sampling.top_p = Some(ask.sampling.top_p.unwrap_or(defaults.top_p));
        // Answers to one prompt differ also under one seed, each in its own repeatable way.
        let seed = ask.seed.unwrap_or_else(|| shared.seams.entropy.u64());
        sampling.seed = seed.wrapping_add(u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let timeout = shared.config.timeouts.request;
        let timeout = origin.timeout.map_or(timeout, |wanted| wanted.min(timeout));
        let trace = origin.trace.child(shared.seams.entropy.u64()).to_string();
        Spec {
            id: format!("{:032x}", shared.seams.entropy.u128()),
            tokens,
            sampling,
            stop,
            cache_salt: ask.cache_salt.clone(),
            arrived: origin.arrived,
            deadline: origin.arrived + timeout,
            request_id: origin.request_id.clone(),
            traceparent: HeaderValue::try_from(trace).expect("hex digits and dashes"),
            deaths,
        }
    }
}

/// Waits for admission, then gives the events of all answers as they come.
struct Run {
    shared: Arc<Shared>,
    ticket: Option<Ticket>,
    permit: Option<Permit>,
    choices: Choices,
}

enum Choices {
    One(Box<Choice>),
    Many(SelectAll<Events>),
}

impl Run {
    fn new(shared: Arc<Shared>, ticket: Ticket, mut choices: Vec<Choice>) -> Self {
        let choices = match choices.pop() {
            Some(one) if choices.is_empty() => Choices::One(Box::new(one)),
            last => {
                let stream = |choice| {
                    let next = |mut choice: Choice| async { Some((choice.next().await?, choice)) };
                    stream::unfold(choice, next).boxed()
                };
                choices.extend(last);
                Choices::Many(choices.into_iter().map(stream).collect())
            }
        };
        Self {
            shared,
            ticket: Some(ticket),
            permit: None,
            choices,
        }
    }

    fn into_stream(self) -> impl Stream<Item = Result<Event, ApiError>> + Send {
        stream::unfold(self, |mut run| async { Some((run.next().await?, run)) })
    }

    async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        if let Some(ticket) = self.ticket.take() {
            match ticket.admit(&self.shared.metrics).await {
                Ok(permit) => self.permit = Some(permit),
                Err(error) => return Some(Err(error)),
            }
        }
        self.permit.as_ref()?;
        match &mut self.choices {
            Choices::One(choice) => choice.next().await,
            Choices::Many(choices) => choices.next().await,
        }
    }
}

fn encode(text: &Text, input: &Input, nonce: u128, field: &str) -> Result<Vec<u32>, ApiError> {
    let encoded = match input {
        Input::Chat { messages, thinking } => text.encode_chat(messages, *thinking, nonce),
        Input::Text(prompt) => text.encode_prompt(prompt),
        Input::Tokens(ids) => Ok(ids.clone()),
    };
    encoded.map_err(|error| match error {
        text::Error::Template(text::TemplateError::Refused(_)) | text::Error::NoTemplate => {
            ApiError::invalid(field, error.to_string())
        }
        _ => {
            tracing::error!(%error, "a prompt could not be encoded");
            ApiError::internal("The prompt could not be tokenised.")
        }
    })
}
