//! `model.safetensors.index.json`: which shard holds which tensor.

use std::{collections::HashMap, path::Path};

use serde::Deserialize;

use super::{Error, read_small};

/// The index of a sharded checkpoint.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The file of a checkpoint that is not sharded.
pub(super) const SINGLE: &str = "model.safetensors";

/// Largest index that is read (the released one has 9 MB).
const MAX_BYTES: u64 = 256 << 20;

#[derive(Deserialize)]
struct IndexJson {
    weight_map: HashMap<String, String>,
}

/// Tensor to file; empty when there is no index and the single file holds everything.
pub(super) fn read(directory: &Path) -> Result<HashMap<String, String>, Error> {
    let path = directory.join(INDEX);
    if !path.exists() {
        return Ok(HashMap::new());
    }
    let broken = |detail| Error::File {
        file: INDEX.into(),
        detail,
    };
    let index: IndexJson = serde_json::from_slice(&read_small(&path, MAX_BYTES)?)
        .map_err(|e| broken(e.to_string()))?;
    if index.weight_map.is_empty() {
        return Err(broken("weight_map is empty".into()));
    }
    for (tensor, file) in &index.weight_map {
        if !is_plain_name(file) {
            return Err(Error::Tensor {
                file: INDEX.into(),
                tensor: tensor.clone(),
                detail: format!("\"{file}\" is not the name of a file in this directory"),
            });
        }
    }
    Ok(index.weight_map)
}

/// A name that cannot lead out of the directory.
fn is_plain_name(file: &str) -> bool {
    !file.is_empty() && file != "." && file != ".." && !file.contains(['/', '\\', '\0', ':'])
}
