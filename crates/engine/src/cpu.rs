//! A checkpoint on the CPU, from its directory to a running engine.

use std::{num::NonZero, sync::Arc, thread::available_parallelism};

use kernels::{Cpu, DType, Precision};
use kv::Pool;
use model::{Checkpoint, Limits, Network, Progress};
use tracing::info;

use crate::{
    Options, StartError,
    api::Engine,
    memory::{TooLittle, available, plan_blocks},
    network::NetworkRunner,
    start,
};

/// Memory for one layer's expanded keys and values, in float32.
const MAX_EXPANDED_BYTES: usize = 256 << 20;

/// How a checkpoint is served. `None` takes the default named with the field.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// What the checkpoint is meant for.
    pub precision: Option<Precision>,
    /// The longest the network knows positions for.
    pub max_model_len: Option<usize>,
    /// Bytes of the KV cache: [`plan_blocks`]' choice.
    pub kv_bytes: Option<usize>,
    /// Threads that compute: as many as the machine has.
    pub threads: Option<usize>,
    /// Leave the MTP layer out. Both pools of a deployment must agree on this.
    pub without_mtp: bool,
    /// Scheduling.
    pub options: Options,
}

/// Why a checkpoint can not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than the network can be.
    #[error("a maximum length of {given} tokens: the network knows positions up to {limit}")]
    MaxModelLen {
        /// What was asked for.
        given: usize,
        /// `max_position_embeddings` of the checkpoint.
        limit: usize,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] TooLittle),
    /// Checkpoint or network.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// Options or thread.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Loads a checkpoint and starts an engine over it. Takes as long as the weights take: call it off the reactor.
///
/// # Errors
/// Whatever is wrong with the configuration, the checkpoint or the machine's memory.
pub fn start_checkpoint(
    checkpoint: &Checkpoint,
    config: &Config,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<Arc<dyn Engine>, Error> {
    let sizes = checkpoint.config();
    let precision = config.precision.unwrap_or_else(|| checkpoint.precision());
    let limit = sizes.max_position_embeddings;
    let max_model_len = config.max_model_len.unwrap_or(limit);
    if max_model_len == 0 || max_model_len > limit {
        let given = max_model_len;
        return Err(Error::MaxModelLen { given, limit });
    }
    let options = config.options;
    let mtp = sizes.mtp && !config.without_mtp;
    let cache_type = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 | Precision::W8A8 | Precision::W8 => DType::Bf16,
    };
    let block_bytes =
        kv::BLOCK_TOKENS * sizes.kv_layers(mtp) * sizes.attention.entry() * cache_type.bytes();
    let blocks = plan_blocks(
        block_bytes,
        max_model_len,
        options.max_running,
        weight_bytes(checkpoint, precision),
        config.kv_bytes,
        available(),
    )?;
    let threads = config
        .threads
        .or_else(|| available_parallelism().ok().map(NonZero::get))
        .unwrap_or(1);
    let limits = Limits {
        max_tokens: options.step_tokens,
        max_sequences: options.max_running,
        max_context: max_model_len,
        max_expanded_context: expanded_context(&sizes.attention, max_model_len),
        expanded_from: 1,
        max_states: options.max_running,
        mtp,
    };
    let backend = Arc::new(Cpu::new(threads));
    let network = Network::load(backend, checkpoint, precision, limits, on_progress)?;
    let revision = checkpoint.revision(precision);
    let runner = NetworkRunner::new(network, blocks, revision.clone())?;
    info!(
        blocks,
        block_bytes,
        threads,
        max_model_len,
        %precision,
        "engine starts"
    );
    Ok(start(runner, Pool::new(blocks, &revision), options)?)
}

/// The longest context whose keys and values are expanded: all or none, so that the form never depends on a prompt's
/// length; none where one layer's keys and values of a whole context would take too much memory.
fn expanded_context(attention: &model::config::Attention, max_model_len: usize) -> usize {
    let bytes = max_model_len * attention.heads * (attention.qk() + attention.v) * 4;
    if bytes <= MAX_EXPANDED_BYTES {
        max_model_len
    } else {
        0
    }
}

/// About what the weights take in memory: the checkpoint's bytes, wider where they are kept wider than stored.
fn weight_bytes(checkpoint: &Checkpoint, precision: Precision) -> usize {
    let stored = match checkpoint.precision() {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
        Precision::W8A8 | Precision::W8 => 1,
    };
    let kept = match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
        Precision::W8A8 | Precision::W8 => 1,
    };
    checkpoint.bytes() / stored * kept
}
