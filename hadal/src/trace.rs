//! `hadal trace`: what a person needs to compare Hadal with any other implementation of the network, in one file.
//!
//! The prompt runs in chunks through the same cache and steps as in a worker; gate choices are taken layer by layer
//! while it runs, cache entries are read back afterwards.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use kernels::{Backend, BlockMemory, Cpu, DType, Precision};
use model::{Checkpoint, Form, LayerDone, Limits, Network, Scratch, Sequence};
use safetensors::tensor::{Dtype, TensorView};

/// Tokens of a KV block.
const BLOCK_TOKENS: usize = model::step::BLOCK_TOKENS;
/// Prompt tokens of a step.
const CHUNK: usize = 512;

/// Write logits, expert choices and cache entries of a sequence to a safetensors file
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint directory (config.json and safetensors)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// JSON file with a list of token ids
    #[arg(long, value_name = "FILE.json")]
    tokens: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// How attention over the prompt is computed [default: as a worker would]
    #[arg(long, value_name = "FORM")]
    forward: Option<Forward>,
    /// f32, bf16, w8a8 or w8 [default: what the checkpoint is meant for]
    #[arg(long, value_name = "P")]
    precision: Option<Precision>,
    /// Tokens to generate greedily after the prompt; end-of-text is a token like others
    #[arg(long, value_name = "N", default_value_t = 0)]
    generate: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Forward {
    /// Keys and values are made from the latents
    Expanded,
    /// Queries go into the latent space
    Absorbed,
}

/// Runs the command, off the reactor.
pub(crate) async fn run(args: Args) -> Result<ExitCode> {
    tokio::task::spawn_blocking(move || trace(&args)).await??;
    Ok(ExitCode::SUCCESS)
}

fn trace(args: &Args) -> Result<()> {
    let tokens = read_tokens(&args.tokens)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let vocab = checkpoint.config().vocab_size;
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
        bail!(
            "{}: token {token} is not below {vocab}, the size of the model's vocabulary",
            args.tokens.display()
        );
    }
    let precision = args.precision.unwrap_or_else(|| checkpoint.precision());
    let context = tokens.len() + args.generate;
    let limits = Limits {
        max_tokens: tokens.len().min(CHUNK),
        max_sequences: 1,
        max_context: context,
        max_expanded_context: tokens.len(),
        expanded_from: model::EXPANDED_FROM,
        max_states: 0,
        mtp: false,
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let backend = Arc::new(Cpu::new(threads));
    let network = Network::load(backend, &checkpoint, precision, limits, &mut |_| {})?;
    let form = match args.forward {
        Some(Forward::Expanded) => Form::Expanded,
        Some(Forward::Absorbed) => Form::Absorbed,
        None => network.form(tokens.len(), tokens.len()),
    };
    let mut tracer = Tracer::new(&network, context)?;
    tracer.prompt(&tokens, form)?;
    tracer.cache_entries(tokens.len())?;
    tracer.generate(&tokens, args.generate)?;
    let Tracer { found, .. } = tracer;
    write(&args.out, &found)?;
    eprintln!(
        "wrote {} ({} tokens, {precision}, {})",
        args.out.display(),
        tokens.len(),
        match form {
            Form::Expanded => "expanded",
            Form::Absorbed => "absorbed",
        }
    );
    Ok(())
}

fn read_tokens(path: &Path) -> Result<Vec<u32>> {
    let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let tokens: Vec<u32> = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a list of token ids", path.display()))?;
    ensure!(!tokens.is_empty(), "{} holds no tokens", path.display());
    Ok(tokens)
}

/// A tensor on its way to the file.
struct Found {
    dtype: Dtype,
    cols: Option<usize>,
    data: Vec<u8>,
}

/// A network running one sequence, and what has been seen of it.
struct Tracer<'a, B: Backend> {
    network: &'a Network<B>,
    scratch: Scratch<B>,
    cache: B::Cache,
    blocks: Vec<u32>,
    logits: Vec<f32>,
    found: BTreeMap<String, Found>,
}

impl<'a, B: Backend> Tracer<'a, B> {
    fn new(network: &'a Network<B>, context: usize) -> Result<Self> {
        let blocks = context.div_ceil(BLOCK_TOKENS);
        Ok(Self {
            network,
            scratch: network.scratch()?,
            cache: network.cache(blocks)?,
            blocks: (0..blocks as u32).collect(),
            logits: Vec::new(),
            found: BTreeMap::new(),
        })
    }

    /// Computes tokens that follow `first` others; their logits are in `self.logits`.
    fn step(
        &mut self,
        tokens: &[u32],
        first: usize,
        form: Form,
        on_layer: &mut dyn FnMut(LayerDone<'_, B>) -> model::Result<()>,
    ) -> Result<()> {
        let (blocks, logits) = (&self.blocks[..], 0..tokens.len());
        let sequence = Sequence {
            tokens,
            first,
            blocks,
            form,
            logits,
            state: None,
        };
        let Self {
            network,
            scratch,
            cache,
            logits,
            ..
        } = self;
        Ok(network.forward(scratch, &[sequence], cache, on_layer, logits)?)
    }

    /// Logits of every position and choices of every gate.
    fn prompt(&mut self, tokens: &[u32], form: Form) -> Result<()> {
        let mut found = BTreeMap::new();
        let mut all = Vec::with_capacity(tokens.len() * self.network.config().vocab_size);
        for (chunk, tokens) in tokens.chunks(CHUNK).enumerate() {
            self.step(tokens, chunk * CHUNK, form, &mut |mut done| {
                gate_choices(&mut done, tokens.len(), &mut found)
            })?;
            ensure_numbers(&self.logits)?;
            all.extend_from_slice(&self.logits);
        }
        self.found.append(&mut found);
        self.add_f32("logits".into(), self.network.config().vocab_size, &all);
        Ok(())
    }

    /// Latents and rope keys of the first `tokens` tokens, by layer.
    fn cache_entries(&mut self, tokens: usize) -> Result<()> {
        let sizes = &self.network.config().attention;
        let (layers, latent_cols) = (self.network.kv_layers(), sizes.kv_lora_rank);
        let layer_bytes = self.cache.block_bytes() / layers;
        for layer in 0..self.network.config().layers {
            let mut values = Vec::new();
            for &block in &self.blocks[..tokens.div_ceil(BLOCK_TOKENS)] {
                let bytes = layer * layer_bytes..(layer + 1) * layer_bytes;
                let dtype = self.network.cache_dtype();
                self.cache.read(block as usize, bytes, &mut |bytes| {
                    widen(dtype, bytes, &mut values);
                })?;
            }
            let (mut latent, mut rope) = (Vec::new(), Vec::new());
            for entry in values.chunks_exact(sizes.entry()).take(tokens) {
                latent.extend_from_slice(&entry[..latent_cols]);
                rope.extend_from_slice(&entry[latent_cols..]);
            }
            self.add_f32(format!("layer.{layer}.latent"), latent_cols, &latent);
            self.add_f32(format!("layer.{layer}.rope_key"), sizes.rope, &rope);
        }
        Ok(())
    }

    /// Greedy tokens after the prompt, whose last logits are in `self.logits`.
    fn generate(&mut self, prompt: &[u32], count: usize) -> Result<()> {
        let mut generated: Vec<u32> = Vec::with_capacity(count);
        while generated.len() < count {
            if let Some(&last) = generated.last() {
                let first = prompt.len() + generated.len() - 1;
                self.step(&[last], first, Form::Absorbed, &mut |_| Ok(()))?;
            }
            let vocab = self.network.config().vocab_size;
            generated.push(greedy(&self.logits[self.logits.len() - vocab..])?);
        }
        if count > 0 {
            let data = generated
                .iter()
                .flat_map(|&token| (token as i32).to_le_bytes())
                .collect();
            self.found.insert(
                "generated".into(),
                Found {
                    dtype: Dtype::I32,
                    cols: None,
                    data,
                },
            );
        }
        Ok(())
    }

    fn add_f32(&mut self, name: String, cols: usize, values: &[f32]) {
        let data = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        self.found.insert(
            name,
            Found {
                dtype: Dtype::F32,
                cols: Some(cols),
                data,
            },
        );
    }
}

/// Appends one layer's ids and weights to what earlier chunks gave.
fn gate_choices<B: Backend>(
    done: &mut LayerDone<'_, B>,
    rows: usize,
    found: &mut BTreeMap<String, Found>,
) -> model::Result<()> {
    let Some(routing) = done.routing else {
        return Ok(());
    };
    for (part, tensor, dtype) in [
        ("topk_ids", &routing.experts, Dtype::I32),
        ("topk_weights", &routing.weights, Dtype::F32),
    ] {
        let mut bytes = vec![0; rows * tensor.cols * tensor.dtype.bytes()];
        done.backend.download(done.stream, tensor, &mut bytes)?;
        done.backend.synchronize(done.stream)?;
        found
            .entry(format!("layer.{}.{part}", done.layer))
            .or_insert_with(|| Found {
                dtype,
                cols: Some(tensor.cols),
                data: Vec::new(),
            })
            .data
            .append(&mut bytes);
    }
    Ok(())
}

/// Cache values as float32.
fn widen(dtype: DType, bytes: &[u8], values: &mut Vec<f32>) {
    match dtype {
        // The upper half of a float32 is the BF16.
        DType::Bf16 => values.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|&[low, high]| f32::from_le_bytes([0, 0, low, high])),
        ),
        _ => values.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes)),
        ),
    }
}

/// Absurd weights overflow; what comes of that must not look like a result.
fn ensure_numbers(logits: &[f32]) -> Result<()> {
    ensure!(
        logits.iter().all(|logit| !logit.is_nan()),
        "the network gave logits that are no numbers"
    );
    Ok(())
}

/// The best token, the lowest of equals.
fn greedy(logits: &[f32]) -> Result<u32> {
    ensure_numbers(logits)?;
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let token = logits.iter().position(|&logit| logit >= best);
    Ok(token.context("there are no logits")? as u32)
}

fn write(path: &Path, found: &BTreeMap<String, Found>) -> Result<()> {
    let tensors = found
        .iter()
        .map(|(name, tensor)| {
            let count = tensor.data.len() * 8 / tensor.dtype.bitsize();
            let shape = match tensor.cols {
                Some(cols) => vec![count / cols, cols],
                None => vec![count],
            };
            Ok((name, TensorView::new(tensor.dtype, shape, &tensor.data)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    safetensors::serialize_to_file(tensors, None, path)
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests;
