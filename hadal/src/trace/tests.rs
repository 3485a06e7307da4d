use std::collections::HashMap;

use clap::Parser;
use safetensors::SafeTensors;
use tempfile::TempDir;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/reference/fixtures")
        .join(name)
}

type Tensors = HashMap<String, (Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let file = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap().tensors();
    let whole = |(name, view): (String, TensorView<'_>)| {
        (name, (view.shape().to_vec(), view.data().to_vec()))
    };
    tensors.into_iter().map(whole).collect()
}

fn f32s((_, data): &(Vec<usize>, Vec<u8>)) -> Vec<f32> {
    data.as_chunks()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect()
}

fn i32s((_, data): &(Vec<usize>, Vec<u8>)) -> Vec<i32> {
    data.as_chunks()
        .0
        .iter()
        .map(|&bytes| i32::from_le_bytes(bytes))
        .collect()
}

/// Runs the command over some tokens of a fixture, with more arguments; the folder holds the outcome.
fn run_over(name: &str, tokens: &[i32], more: &[&str]) -> Result<(TempDir, Tensors)> {
    let folder = tempfile::tempdir()?;
    let (list, out) = (
        folder.path().join("tokens.json"),
        folder.path().join("out.safetensors"),
    );
    fs::write(&list, serde_json::to_vec(tokens)?)?;
    let (model, list, out_name) = (
        fixture(name),
        list.display().to_string(),
        out.display().to_string(),
    );
    let model = model.display().to_string();
    let args = [
        "trace", "--model", &model, "--tokens", &list, "--out", &out_name,
    ];
    trace(&Cli::try_parse_from(args.iter().chain(more))?.args)?;
    let tensors = read(&out);
    Ok((folder, tensors))
}

#[test]
fn traces_hold_what_float64_says_in_every_tensor() {
    let expected = read(&fixture("f32").join("expected.safetensors"));
    let tokens = i32s(&expected["tokens"]);
    for forward in ["expanded", "absorbed"] {
        let (_folder, traced) = run_over("f32", &tokens, &["--forward", forward]).unwrap();
        let names = [
            "logits",
            "layer.0.latent",
            "layer.0.rope_key",
            "layer.1.topk_weights",
            "layer.2.latent",
        ];
        assert!(names.iter().all(|name| traced.contains_key(*name)));
        assert!(!traced.contains_key("layer.0.topk_ids"), "layer 0 is dense");
        for (name, found) in &traced {
            assert_eq!(found.0, expected[name].0, "{name}");
            if name.ends_with("topk_ids") {
                assert_eq!(i32s(found), i32s(&expected[name]), "{name}");
                continue;
            }
            let far = f32s(found)
                .iter()
                .zip(f32s(&expected[name]))
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(far < 1e-4, "{forward} {name}: off by {far}");
        }
    }
}

#[test]
fn generated_tokens_are_those_of_float64() {
    let expected = read(&fixture("fp8").join("expected.safetensors"));
    let prompt = &i32s(&expected["tokens"])[..24];
    let more = ["--precision", "f32", "--generate", "64"];
    let (_folder, traced) = run_over("fp8", prompt, &more).unwrap();
    assert_eq!(traced["generated"].0, [64]);
    assert_eq!(i32s(&traced["generated"]), i32s(&expected["generated"]));
}

#[test]
fn long_prompts_are_traced_chunk_by_chunk() {
    let tokens: Vec<i32> = (0..CHUNK as i32 + 70).map(|i| i * 7 % 96).collect();
    let (_folder, traced) = run_over("bf16-plain", &tokens, &[]).unwrap();
    let rows = tokens.len();
    assert_eq!(traced["logits"].0, [rows, 96]);
    assert_eq!(traced["layer.0.topk_ids"].0, [rows, 3]);
    assert_eq!(traced["layer.1.latent"].0, [rows, 32]);
    // A shorter trace is the beginning of the longer one: nothing looks ahead.
    let (_folder, short) = run_over("bf16-plain", &tokens[..300], &[]).unwrap();
    assert_eq!(f32s(&short["logits"]), f32s(&traced["logits"])[..300 * 96]);
}

#[test]
fn what_cannot_be_traced_is_said_clearly() {
    let says = |name: &str, tokens: &[i32], more: &[&str]| {
        format!("{:#}", run_over(name, tokens, more).err().unwrap())
    };
    assert!(says("bf16", &[96], &[]).contains("token 96 is not below 96"));
    assert!(says("bf16", &[-1], &[]).contains("is not a list of token ids"));
    assert!(says("bf16", &[], &[]).contains("holds no tokens"));
    assert!(says("bf16", &[1], &["--precision", "w8a8"]).contains("needs a checkpoint with FP8"));
    assert!(says("bf16", &[1], &["--precision", "fp4"]).contains("none of f32, bf16, w8a8, w8"));
    assert!(says("gone", &[1], &[]).contains("config.json"));
}
