//! Times steps of a checkpoint's network on the CPU, on request: the Hadal side of `tests/reference/hf_bench.py`.
//!
//! `cargo bench -p model --bench steps -- DIR THREADS [PRECISION]` loads the checkpoint and answers each line of standard
//! input (`prefill BATCH TOKENS` or `decode BATCH CONTEXT STEPS`) with the seconds it took, weights and cache being warm,
//! and the main thread's processor seconds: with one thread, what a busy machine does not distort. Attention has the forms
//! that the engine chooses on the CPU: expanded for prompts, absorbed for what follows.

use std::{
    io::{self, BufRead as _, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use kernels::Cpu;
use model::{Checkpoint, Form, Limits, Network, Scratch, Sequence};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const MAX_SEQUENCES: usize = 16;
const MAX_CONTEXT: usize = 1024;
const BLOCKS: usize = MAX_CONTEXT / model::step::BLOCK_TOKENS;

/// Wall clock and the main thread's time on a processor.
struct Watch {
    wall: Instant,
    processor: f64,
}

impl Watch {
    fn start() -> Result<Self> {
        Ok(Self {
            wall: Instant::now(),
            processor: processor_seconds()?,
        })
    }

    fn stop(&self) -> Result<(f64, f64)> {
        Ok((
            self.wall.elapsed().as_secs_f64(),
            processor_seconds()? - self.processor,
        ))
    }
}

/// Linux: nanoseconds the main thread has run.
fn processor_seconds() -> Result<f64> {
    let line = std::fs::read_to_string("/proc/self/schedstat")?;
    let nanoseconds = line.split_whitespace().next().ok_or("schedstat is empty")?;
    Ok(nanoseconds.parse::<f64>()? * 1e-9)
}

struct Bench {
    network: Network<Cpu>,
    scratch: Scratch<Cpu>,
    cache: <Cpu as kernels::Backend>::Cache,
    logits: Vec<f32>,
}

fn main() -> Result<()> {
    // `cargo bench` adds a flag of its own.
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let Some(directory) = args.next() else {
        println!("steps: no checkpoint directory given, nothing timed");
        return Ok(());
    };
    let checkpoint = Checkpoint::open(&PathBuf::from(directory))?;
    let threads = args.next().ok_or("number of threads is missing")?.parse()?;
    let precision = args.next().map(|name| name.parse()).transpose()?;
    let precision = precision.unwrap_or_else(|| checkpoint.precision());
    let limits = Limits {
        max_tokens: 2048,
        max_sequences: MAX_SEQUENCES,
        max_context: MAX_CONTEXT,
        max_expanded_context: MAX_CONTEXT,
        expanded_from: 1,
        max_states: 0,
        mtp: false,
    };
    let backend = Arc::new(Cpu::new(threads));
    let network = Network::load(backend, &checkpoint, precision, limits, &mut |_| {})?;
    let (scratch, cache) = (network.scratch()?, network.cache(MAX_SEQUENCES * BLOCKS)?);
    let mut bench = Bench {
        network,
        scratch,
        cache,
        logits: Vec::new(),
    };
    println!("ready {precision} {threads}");
    for line in io::stdin().lock().lines() {
        let (wall, processor) = bench.answer(&line?)?;
        println!("{wall} {processor}");
        io::stdout().flush()?;
    }
    Ok(())
}

impl Bench {
    fn answer(&mut self, line: &str) -> Result<(f64, f64)> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| -> Result<usize> {
            Ok(words.get(at).ok_or("a number is missing")?.parse()?)
        };
        let batch = number(1)?;
        match words.first() {
            Some(&"prefill") => {
                let tokens = number(2)?;
                let start = Watch::start()?;
                self.step(batch, 0, tokens, Form::Expanded)?;
                start.stop()
            }
            Some(&"decode") => {
                let context = number(2)?;
                self.step(batch, 0, context, Form::Expanded)?;
                let start = Watch::start()?;
                for step in 0..number(3)? {
                    self.step(batch, context + step, 1, Form::Absorbed)?;
                }
                start.stop()
            }
            _ => Err(format!("\"{line}\" is neither prefill nor decode").into()),
        }
    }

    /// `new` tokens for each sequence after `first` others, logits of the last.
    fn step(&mut self, batch: usize, first: usize, new: usize, form: Form) -> Result<()> {
        let vocab = self.network.config().vocab_size;
        let tokens: Vec<u32> = (0..batch * new)
            .map(|i| ((first + i) * 31 % vocab) as u32)
            .collect();
        let blocks: Vec<u32> = (0..(batch * BLOCKS) as u32).collect();
        let sequences: Vec<Sequence<'_>> = tokens
            .chunks(new)
            .zip(blocks.chunks(BLOCKS))
            .map(|(tokens, blocks)| Sequence {
                tokens,
                first,
                blocks,
                form,
                logits: new - 1..new,
                state: None,
            })
            .collect();
        let Self {
            network,
            scratch,
            cache,
            logits,
        } = self;
        Ok(network.forward(scratch, &sequences, cache, &mut |_| Ok(()), logits)?)
    }
}
