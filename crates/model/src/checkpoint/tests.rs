use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Config of one dense layer with two heads; small enough to write out every tensor.
fn config(fp8: bool) -> Value {
    let mut config = json!({
        "vocab_size": 6, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 10,
        "num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
        "v_head_dim": 4, "q_lora_rank": null,
    });
    if fp8 {
        config["quantization_config"] =
            json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    }
    config
}

/// Name, type, shape, data of each tensor of [`config`].
type Raw = (String, &'static str, Vec<usize>, Vec<u8>);

fn tensors(fp8: bool) -> Vec<Raw> {
    let mut all = Vec::new();
    for (name, shape) in [
        ("model.embed_tokens", vec![6, 8]),
        ("model.norm", vec![8]),
        ("lm_head", vec![6, 8]),
        ("model.layers.0.input_layernorm", vec![8]),
        ("model.layers.0.post_attention_layernorm", vec![8]),
        ("model.layers.0.self_attn.q_proj", vec![12, 8]),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", vec![6, 8]),
        ("model.layers.0.self_attn.kv_a_layernorm", vec![4]),
        ("model.layers.0.self_attn.kv_b_proj", vec![16, 4]),
        ("model.layers.0.self_attn.o_proj", vec![8, 8]),
        ("model.layers.0.mlp.gate_proj", vec![10, 8]),
        ("model.layers.0.mlp.up_proj", vec![10, 8]),
        ("model.layers.0.mlp.down_proj", vec![8, 10]),
    ] {
        let count: usize = shape.iter().product();
        let name = format!("{name}.weight");
        if fp8 && name.contains("_proj") {
            let scale = 0.5f32.to_le_bytes().to_vec();
            all.push((format!("{name}_scale_inv"), "F32", vec![1, 1], scale));
            all.push((name, "F8_E4M3", shape, vec![0x38; count]));
        } else {
            all.push((name, "F32", shape, 1f32.to_le_bytes().repeat(count)));
        }
    }
    all
}

fn file(tensors: &[Raw]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    with_header(&Value::Object(header).to_string(), &data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        data,
    ]
    .concat()
}

fn directory(config: &Value, model: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join(index::SINGLE), model).unwrap();
    dir
}

fn open_all(dir: &Path) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let names: Vec<_> = checkpoint
        .tensors
        .keys()
        .filter(|n| n.ends_with(".weight"))
        .collect();
    for name in names {
        checkpoint.matrix(name)?;
    }
    Ok(())
}

fn refusal(config: &Value, model: &[u8]) -> String {
    open_all(directory(config, model).path())
        .unwrap_err()
        .to_string()
}

#[test]
fn whole_checkpoints_open_and_know_their_precision() {
    for (fp8, precision) in [(false, Precision::F32), (true, Precision::W8A8)] {
        let dir = directory(&config(fp8), &file(&tensors(fp8)));
        open_all(dir.path()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.precision(), precision);
        assert_eq!(checkpoint.check_precision(Precision::W8).is_ok(), fp8);
        let o_proj = checkpoint
            .matrix("model.layers.0.self_attn.o_proj.weight")
            .unwrap();
        assert_eq!(o_proj.to_f32(), vec![if fp8 { 0.5 } else { 1.0 }; 64]);
    }
}

#[test]
fn shards_are_found_through_the_index() {
    let all = tensors(false);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config(false).to_string()).unwrap();
    fs::write(dir.path().join("a.safetensors"), file(&all[..5])).unwrap();
    fs::write(dir.path().join("b.safetensors"), file(&all[5..])).unwrap();
    let write_index = |edit: &dyn Fn(&mut Value)| {
        let place = |(i, t): (usize, &Raw)| {
            (
                t.0.clone(),
                json!(if i < 5 {
                    "a.safetensors"
                } else {
                    "b.safetensors"
                }),
            )
        };
        let map: serde_json::Map<_, _> = all.iter().enumerate().map(place).collect();
        let mut index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        edit(&mut index["weight_map"]);
        fs::write(dir.path().join(index::INDEX), index.to_string()).unwrap();
    };
    write_index(&|_| {});
    open_all(dir.path()).unwrap();
    for (file, says) in [
        (
            "../a.safetensors",
            "not the name of a file in this directory",
        ),
        ("/etc/passwd", "not the name of a file in this directory"),
        ("..", "not the name of a file in this directory"),
        ("gone.safetensors", "gone.safetensors"),
        ("b.safetensors", "says it is here, but it is not"),
    ] {
        write_index(&|map| map["model.norm.weight"] = json!(file));
        let error = open_all(dir.path()).unwrap_err().to_string();
        assert!(error.contains(says), "{file}: {error}");
    }
}

#[test]
fn broken_headers_are_refused_with_a_reason() {
    let one = |entry: &str| with_header(&format!("{{\"t\": {entry}}}"), &[0; 8]);
    for (model, says) in [
        (vec![1, 2, 3], "3 bytes are too few"),
        (u64::MAX.to_le_bytes().to_vec(), "is absurd"),
        (1000u64.to_le_bytes().to_vec(), "truncated"),
        (with_header("[]", &[]), "does not begin with {"),
        (with_header("", &[]), "does not begin with {"),
        (with_header("{\"a\"", &[]), "header: "),
        (with_header(&"{\"a\":".repeat(100_000), &[]), "header: "),
        (
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#),
            "tensor t: offsets 8..0 are reversed",
        ),
        (
            one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#),
            "truncated",
        ),
        (
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
            "4 bytes at the end belong to no",
        ),
        (
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#),
            "before it belong to no tensor",
        ),
        (
            one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#),
            "needs 12",
        ),
        (
            one(r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#),
            "has no elements",
        ),
        (
            one(r#"{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}"#),
            "element type \"Q9\" is unknown",
        ),
        (
            one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#),
            "tensor t",
        ),
        (
            one(r#"{"dtype":"U8","shape":[4194305,4194305,211106198978564],"data_offsets":[0,4]}"#),
            "overflows",
        ),
        (
            with_header(
                r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                &[0; 8],
            ),
            "stands twice",
        ),
        (
            with_header(
                r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"u":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                &[0; 8],
            ),
            "overlap tensor t",
        ),
    ] {
        let error = refusal(&config(false), &model);
        assert!(
            error.contains(says) && error.contains(index::SINGLE),
            "{says}: {error}"
        );
    }
}

#[test]
fn every_missing_or_misshapen_tensor_is_named() {
    for fp8 in [false, true] {
        let all = tensors(fp8);
        for number in 0..all.len() {
            let mut less = all.clone();
            let gone = less.remove(number).0;
            let error = refusal(&config(fp8), &file(&less));
            assert!(
                error.contains(&format!("tensor {gone}: missing")),
                "{error}"
            );
            let mut wrong = all.clone();
            wrong[number].2.push(1);
            let error = refusal(&config(fp8), &file(&wrong));
            assert!(
                error.contains(&format!("tensor {}: shape", wrong[number].0)),
                "{error}"
            );
        }
    }
}

#[test]
fn a_configuration_of_millions_of_tensors_is_refused_at_the_first_missing_one() {
    let mut huge = config(false);
    for (field, count) in [("num_hidden_layers", 4096), ("n_routed_experts", 65_536)] {
        huge[field] = json!(count);
    }
    for field in ["num_experts_per_tok", "moe_intermediate_size"] {
        huge[field] = json!(1);
    }
    let error = refusal(&huge, &file(&tensors(false)));
    assert!(
        error.contains("model.layers.0.mlp.experts.0.gate_proj.weight: missing"),
        "{error}"
    );
}

#[test]
fn values_that_are_no_numbers_are_refused() {
    let all = tensors(true);
    for (number, (name, dtype, _, _)) in all.iter().enumerate() {
        let bad: Vec<Vec<u8>> = match *dtype {
            "F8_E4M3" => vec![vec![0x7f], vec![0xff]],
            _ if name.ends_with("scale_inv") => [f32::NAN, f32::INFINITY, -0.5, 0.0]
                .map(|scale| scale.to_le_bytes().to_vec())
                .to_vec(),
            _ => vec![
                f32::NAN.to_le_bytes().to_vec(),
                f32::INFINITY.to_le_bytes().to_vec(),
            ],
        };
        for bytes in bad {
            let mut broken = all.clone();
            broken[number].3[..bytes.len()].copy_from_slice(&bytes);
            let error = refusal(&config(true), &file(&broken));
            assert!(
                error.contains(name) && error.contains(index::SINGLE),
                "{name}: {error}"
            );
        }
    }
}

#[test]
fn types_the_network_cannot_use_are_refused() {
    let mut all = tensors(false);
    let norm = all.iter_mut().find(|t| t.0 == "model.norm.weight").unwrap();
    (norm.1, norm.3) = ("F16", vec![0; 16]);
    assert!(refusal(&config(false), &file(&all)).contains("element type is none of"));
}

#[test]
fn revision_follows_weights_configuration_and_precision() {
    let open = |config: &Value, tensors: &[Raw]| {
        let dir = directory(config, &file(tensors));
        Checkpoint::open(dir.path())
            .unwrap()
            .revision(Precision::F32)
    };
    let all = tensors(false);
    let first = open(&config(false), &all);
    assert_eq!(first, open(&config(false), &all));
    let mut weights = all.clone();
    weights[3].3[0] ^= 1;
    assert_ne!(first, open(&config(false), &weights));
    let mut other = config(false);
    other["rms_norm_eps"] = json!(1e-5);
    assert_ne!(first, open(&other, &all));
    let dir = directory(&config(false), &file(&all));
    assert_ne!(
        first,
        Checkpoint::open(dir.path())
            .unwrap()
            .revision(Precision::Bf16)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        in_header in any::<bool>(),
    ) {
        let mut model = file(&tensors(true));
        let header = 8 + u64::from_le_bytes(*model.first_chunk().unwrap()) as usize;
        for (at, byte) in edits {
            let range = if in_header { header } else { model.len() };
            model[at.index(range)] = byte;
        }
        if let Some(cut) = cut {
            model.truncate(cut.index(model.len()));
        }
        if let Err(error) = open_all(directory(&config(true), &model).path()) {
            prop_assert!(error.to_string().contains("model"), "{}", error);
        }
    }

    #[test]
    fn random_bytes_never_panic(header in prop::collection::vec(any::<u8>(), 0..300)) {
        let text = String::from_utf8_lossy(&header);
        let empty = text.starts_with("{}");
        prop_assert!(header::parse(&with_header(&text, &[])).is_err() || empty);
    }
}
