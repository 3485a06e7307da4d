//! A released-format checkpoint directory: `config.json` and safetensors, one file or shards with an index.
//!
//! [`Checkpoint::open`] maps the files and checks everything that can be checked without touching the weights: every
//! header, every offset, and that each tensor the configuration asks for is there in its type and shape. Values are
//! checked when a [`Matrix`] is taken. Nothing is read before somebody asks for it, so a rank reads only its part.

mod header;
mod index;
mod inventory;
mod matrix;
mod revision;

use std::{
    collections::HashMap,
    fs::{self, File},
    ops::Range,
    path::{Path, PathBuf},
};

use kernels::Precision;
use memmap2::Mmap;

pub use self::{header::ElementType, matrix::Matrix};
use crate::config::{self, Config};

/// Why a checkpoint is refused: one sentence that names the file and the tensor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// A file cannot be read.
    #[error("reading {file}")]
    Read {
        /// The file.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is broken.
    #[error("{file}: {detail}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A tensor is broken, or not what the configuration asks for.
    #[error("{file}: tensor {tensor}: {detail}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The precision cannot be computed from these weights.
    #[error("precision {precision} needs a checkpoint with FP8 weights, and {directory} has none")]
    Precision {
        /// What was asked for.
        precision: Precision,
        /// The checkpoint.
        directory: String,
    },
}

/// One mapped file.
#[derive(Debug)]
struct Shard {
    name: String,
    map: Mmap,
    /// Bytes of the header with its length.
    data: usize,
}

/// Where a tensor is.
#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: ElementType,
    shape: Vec<usize>,
    /// Bytes within the file's data.
    bytes: Range<usize>,
}

/// A checked checkpoint directory.
#[derive(Debug)]
pub struct Checkpoint {
    directory: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
}

impl Checkpoint {
    /// Maps and checks the checkpoint in `directory`.
    ///
    /// The files must not be cut while they are mapped (as with any mapped file, the process would get a signal).
    ///
    /// # Errors
    /// The first flaw found.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let mut config = Config::read(directory)?;
        let placed = index::read(directory)?;
        let mut names: Vec<&str> = placed.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        let names = if placed.is_empty() {
            vec![index::SINGLE]
        } else {
            names
        };
        let mut shards = Vec::with_capacity(names.len());
        let mut tensors = HashMap::new();
        for (number, name) in names.iter().enumerate() {
            let (shard, entries) = map(directory, name)?;
            for (tensor, entry) in entries {
                // A shard may hold more than the index speaks of; the index decides.
                if placed.is_empty() || placed.get(&tensor).is_some_and(|file| file == name) {
                    tensors.insert(
                        tensor,
                        Entry {
                            shard: number,
                            ..entry
                        },
                    );
                }
            }
            shards.push(shard);
        }
        if let Some((tensor, file)) = placed
            .iter()
            .find(|(tensor, _)| !tensors.contains_key(*tensor))
        {
            return Err(Error::Tensor {
                file: file.clone(),
                tensor: tensor.clone(),
                detail: format!("{} says it is here, but it is not", index::INDEX),
            });
        }
        let mtp = format!("model.layers.{}.", config.layers);
        if config.mtp && !tensors.keys().any(|name| name.starts_with(&mtp)) {
            tracing::warn!("the configuration speaks of an MTP layer, but no tensor belongs to it");
            config.mtp = false;
        }
        let checkpoint = Self {
            directory: directory.to_owned(),
            config,
            shards,
            tensors,
        };
        inventory::check(&checkpoint)?;
        Ok(checkpoint)
    }

    /// The network's sizes. `mtp` is true only if the layer's tensors are there.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the checkpoint is meant for: `W8A8` for FP8 weights, otherwise the type of its attention output weights.
    pub fn precision(&self) -> Precision {
        match self
            .tensors
            .get("model.layers.0.self_attn.o_proj.weight")
            .map(|entry| entry.dtype)
        {
            Some(ElementType::F8E4M3) => Precision::W8A8,
            Some(ElementType::F32) => Precision::F32,
            _ => Precision::Bf16,
        }
    }

    /// Refuses a precision that needs FP8 weights where there are none.
    ///
    /// # Errors
    /// [`Error::Precision`].
    pub fn check_precision(&self, precision: Precision) -> Result<(), Error> {
        let fp8 = self
            .tensors
            .values()
            .any(|entry| entry.dtype == ElementType::F8E4M3);
        if fp8 || matches!(precision, Precision::F32 | Precision::Bf16) {
            return Ok(());
        }
        Err(Error::Precision {
            precision,
            directory: self.directory.display().to_string(),
        })
    }

    /// Bytes of all tensors, for progress and memory checks.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|entry| entry.bytes.len()).sum()
    }

    fn data(&self, entry: &Entry) -> &[u8] {
        let shard = &self.shards[entry.shard];
        &shard.map[shard.data + entry.bytes.start..shard.data + entry.bytes.end]
    }

    fn flaw(&self, entry: &Entry, tensor: &str, detail: String) -> Error {
        Error::Tensor {
            file: self.shards[entry.shard].name.clone(),
            tensor: tensor.into(),
            detail,
        }
    }

    fn missing(&self, tensor: &str) -> Error {
        let file = if self.shards.len() == 1 {
            &self.shards[0].name
        } else {
            index::INDEX
        };
        Error::Tensor {
            file: file.into(),
            tensor: tensor.into(),
            detail: "missing".into(),
        }
    }
}

/// Maps one file and reads its header.
#[expect(
    unsafe_code,
    reason = "mapping a file is the one way to read only what is asked for"
)]
fn map(directory: &Path, name: &str) -> Result<(Shard, Vec<(String, Entry)>), Error> {
    let path = directory.join(name);
    let read = |source| Error::Read {
        file: path.display().to_string(),
        source,
    };
    let file = File::open(&path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    let broken = |detail| Error::File {
        file: name.into(),
        detail,
    };
    if size < 8 {
        return Err(broken(format!(
            "{size} bytes are too few for a safetensors file"
        )));
    }
    // SAFETY: the map is read-only and lives as long as the checkpoint; that nobody cuts or rewrites the file meanwhile
    // is the caller's duty, written at `Checkpoint::open`. Every byte pattern is a valid `u8`.
    let map = unsafe { Mmap::map(&file) }.map_err(read)?;
    let (data, found) = header::parse(&map).map_err(|flaw| flaw.in_file(name))?;
    let entries = found
        .into_iter()
        .map(|t| {
            (
                t.name,
                Entry {
                    shard: 0,
                    dtype: t.dtype,
                    shape: t.shape,
                    bytes: t.bytes,
                },
            )
        })
        .collect();
    Ok((
        Shard {
            name: name.into(),
            map,
            data,
        },
        entries,
    ))
}

/// Reads a small file whole, refusing one that is larger than `limit`.
fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let file = path.display().to_string();
    let read = |source| Error::Read {
        file: file.clone(),
        source,
    };
    if fs::metadata(path).map_err(read)?.len() > limit {
        return Err(Error::File {
            file,
            detail: format!("larger than {limit} bytes"),
        });
    }
    fs::read(path).map_err(read)
}

#[cfg(test)]
mod tests;
