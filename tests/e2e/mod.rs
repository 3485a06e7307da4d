//! Real processes, real sockets, a real (if small) network.

mod drain;
mod faults;
mod openai_client;
mod serving;
mod starting;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use serde_json::{Value, json};

/// The name under which tests serve their model.
const MODEL: &str = "tiny";

/// A random checkpoint of the DeepSeek-V3 shape. What it says is nonsense, but always the same nonsense.
fn checkpoint() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // Not a temporary directory: nobody would remove it, for statics are never dropped.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e-checkpoint");
        fs::create_dir_all(&folder).expect("a directory among the build outputs");
        testkit::checkpoint::write_tiny(&folder, 7).expect("a checkpoint is written");
        folder
    })
}

/// Held by tests that start deployments: side by side on a small machine they would only time each other out.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed says nothing about the next one.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A greedy completion of `tokens` tokens that goes on past end-of-text, streamed.
fn completion(prompt: &[u32], tokens: u32) -> Value {
    json!({
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
    })
}

/// Token ids of a prompt; different names give different prompts.
fn prompt(name: u32, tokens: u32) -> Vec<u32> {
    (0..tokens)
        .map(|i| 20 + (i * 7 + name * 31 + i * i % 11) % 200)
        .collect()
}
