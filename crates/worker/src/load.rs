//! From a checkpoint's directory to a running engine.

use std::sync::Arc;

use anyhow::bail;
use engine::api::Engine;
use telemetry::announce::Announcement;
use tokio::sync::oneshot;

use crate::cli::{Backend, Settings};

/// A running engine, and what is known of it now.
pub(crate) struct Loaded {
    pub(crate) engine: Arc<dyn Engine>,
    /// Workers of different revisions never meet.
    pub(crate) revision: String,
    pub(crate) precision: String,
    /// Weights and cache.
    pub(crate) memory_bytes: u64,
}

/// Loads on a thread of its own: a process that is told to stop does not wait for it.
pub(crate) async fn load(settings: Settings) -> anyhow::Result<Loaded> {
    let (done, loaded) = oneshot::channel();
    std::thread::Builder::new()
        .name("load".into())
        .spawn(move || {
            // Nobody waits for it any more where the process ends.
            let _ = done.send(run(&settings));
        })?;
    loaded.await?
}

fn run(settings: &Settings) -> anyhow::Result<Loaded> {
    match settings.backend {
        Backend::Auto | Backend::Cpu => {}
        Backend::Cuda => bail!(
            "--backend cuda: this build computes on the processor only; use --backend auto or cpu"
        ),
    }
    let checkpoint = model::Checkpoint::open(&settings.model)?;
    let precision = settings.precision.unwrap_or_else(|| checkpoint.precision());
    let config = engine::cpu::Config {
        precision: Some(precision),
        max_model_len: settings.max_model_len,
        kv_bytes: settings.kv_memory,
        threads: settings.threads,
        options: settings.options,
        ..engine::cpu::Config::default()
    };
    let engine = engine::cpu::start_checkpoint(&checkpoint, &config, &mut |progress| {
        let (done, total) = (progress.layers as u64, progress.total as u64);
        // A closed output means that nobody follows.
        let _ = Announcement::Loading {
            stage: "weights".into(),
            done,
            total,
        }
        .emit();
    })?;
    let cache = engine.format().block_bytes() * engine.pool().usage().total;
    Ok(Loaded {
        revision: engine.format().revision.clone(),
        precision: precision.to_string(),
        memory_bytes: (checkpoint.bytes() + cache) as u64,
        engine,
    })
}
