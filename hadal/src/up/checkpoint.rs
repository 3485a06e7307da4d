//! Finding the checkpoint and judging, before anything starts, whether it can be served here.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use kernels::Precision;
use serde_json::Value;

/// The checkpoint that the repository brings.
const DEMO: &str = "models/demo";

/// The demo checkpoint of the checkout that holds one of `starts`.
pub(super) fn find_demo(starts: &[PathBuf]) -> Option<PathBuf> {
    starts
        .iter()
        .flat_map(|start| start.ancestors())
        .map(|folder| folder.join(DEMO))
        .find(|folder| folder.join("config.json").is_file())
}

/// What can be known of a checkpoint without reading its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Checkpoint {
    /// Size of the weight files.
    pub(super) bytes: u64,
    /// Bytes of a weight as stored: 1 for FP8, 2 for BF16, 4 for F32.
    pub(super) weight_bytes: u64,
}

impl Checkpoint {
    /// Looks at `folder`.
    ///
    /// # Errors
    /// Sentences that say what is missing.
    pub(super) fn inspect(folder: &Path) -> Result<Self, String> {
        let shown = folder.display();
        if !folder.is_dir() {
            return Err(format!(
                "there is no checkpoint directory {shown}; name one with --model DIR"
            ));
        }
        let config = fs::read_to_string(folder.join("config.json"))
            .map_err(|error| format!("cannot read {shown}/config.json: {error}"))?;
        let config: Value = serde_json::from_str(&config)
            .map_err(|error| format!("{shown}/config.json is no JSON: {error}"))?;
        if !folder.join("tokenizer.json").is_file() {
            return Err(format!("{shown}/tokenizer.json is missing"));
        }
        let bytes =
            weight_file_bytes(folder).map_err(|error| format!("cannot read {shown}: {error}"))?;
        if bytes == 0 {
            return Err(format!("{shown} holds no *.safetensors file"));
        }
        Ok(Self {
            bytes,
            weight_bytes: stored_weight_bytes(&config),
        })
    }

    /// Memory that `processes` workers need for weights. Stored weights that are used as they are stay in the page cache
    /// once for all; weights in another precision are copies.
    pub(super) fn memory_bytes(&self, precision: Option<Precision>, processes: u64) -> u64 {
        let wanted = precision.map_or(self.weight_bytes, weight_bytes);
        let copy = self.bytes / self.weight_bytes * wanted;
        if wanted == self.weight_bytes {
            self.bytes
        } else {
            self.bytes + copy * processes
        }
    }
}

/// Bytes of memory for each weight.
fn weight_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
        Precision::W8A8 | Precision::W8 => 1,
    }
}

fn weight_file_bytes(folder: &Path) -> io::Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            total += fs::metadata(path)?.len();
        }
    }
    Ok(total)
}

fn stored_weight_bytes(config: &Value) -> u64 {
    if config["quantization_config"]["quant_method"] == "fp8" {
        return 1;
    }
    let stored = config
        .get("torch_dtype")
        .or(config.get("dtype"))
        .and_then(Value::as_str);
    if stored == Some("float32") { 4 } else { 2 }
}

/// Memory that can be had now, where the system says it.
pub(super) fn available_memory_bytes() -> Option<u64> {
    parse_available(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_demo_is_found_from_anywhere_inside_a_checkout() {
        let checkout = tempfile::tempdir().unwrap();
        let demo = checkout.path().join(DEMO);
        let inside = checkout.path().join("crates/kv/src");
        fs::create_dir_all(&demo).unwrap();
        fs::create_dir_all(&inside).unwrap();
        assert_eq!(
            find_demo(std::slice::from_ref(&inside)),
            None,
            "no config.json yet"
        );
        fs::write(demo.join("config.json"), "{}").unwrap();
        assert_eq!(find_demo(&[inside]), Some(demo));
    }

    #[test]
    fn what_a_checkpoint_lacks_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let inspect = || Checkpoint::inspect(folder.path()).unwrap_err();
        assert!(inspect().contains("config.json"));
        fs::write(folder.path().join("config.json"), "{").unwrap();
        assert!(inspect().contains("no JSON"));
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert!(inspect().contains("tokenizer.json"));
        fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        assert!(inspect().contains("safetensors"));
    }

    #[test]
    fn weights_in_their_own_precision_are_shared_and_others_are_copied() {
        let fp8 = Checkpoint {
            bytes: 100,
            weight_bytes: 1,
        };
        assert_eq!(fp8.memory_bytes(None, 3), 100);
        assert_eq!(fp8.memory_bytes(Some(Precision::W8), 3), 100);
        assert_eq!(fp8.memory_bytes(Some(Precision::F32), 3), 100 + 3 * 400);
    }

    #[test]
    fn the_stored_precision_is_read_from_the_config() {
        assert_eq!(
            stored_weight_bytes(&json!({"quantization_config": {"quant_method": "fp8"}})),
            1
        );
        assert_eq!(stored_weight_bytes(&json!({"torch_dtype": "bfloat16"})), 2);
        assert_eq!(stored_weight_bytes(&json!({"torch_dtype": "float32"})), 4);
    }

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:       24000 kB\nMemAvailable:    12000 kB\n";
        assert_eq!(parse_available(meminfo), Some(12000 * 1024));
    }
}
