//! A random checkpoint in the released format: the DeepSeek-V3 shape at a size that loads in milliseconds. What it says
//! is nonsense, but it is always the same nonsense, and every part of the network takes part in it.

use std::{collections::BTreeMap, fs, io, path::Path};

use half::bf16;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

const LAYERS: usize = 3;
const HIDDEN: usize = 128;
const HEADS: usize = 4;
const Q_LORA: usize = 64;
const KV_LORA: usize = 64;
const NOPE: usize = 32;
const ROPE: usize = 16;
const V: usize = 32;
const DENSE: usize = 192;
const EXPERT: usize = 32;
const EXPERTS: usize = 16;
/// Edge of a block of weights that share a scale.
const BLOCK: usize = 128;
/// Largest finite value of E4M3.
const E4M3_MAX: f32 = 448.0;

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";
const SPECIAL: [&str; 5] = [BOS, EOS, "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"];
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}\
    {{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}\
    {{ '<｜Assistant｜>' + m['content'] + eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}";

/// Writes a checkpoint (FP8 blocks, two shards with an index, tokenizer, chat template) into `folder`. The same seed
/// gives the same bytes.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_tiny(folder: &Path, seed: u64) -> io::Result<()> {
    let vocabulary = vocabulary();
    let write = |name: &str, value: Value| fs::write(folder.join(name), value.to_string());
    write("config.json", config(vocabulary.len()))?;
    write("tokenizer.json", tokenizer(&vocabulary))?;
    write(
        "tokenizer_config.json",
        json!({
            "add_bos_token": true,
            "bos_token": BOS,
            "eos_token": EOS,
            "chat_template": TEMPLATE,
        }),
    )?;
    write("generation_config.json", json!({"eos_token_id": 1}))?;
    let mut weights = Weights {
        random: SmallRng::seed_from_u64(seed),
        tensors: BTreeMap::new(),
    };
    weights.network(vocabulary.len());
    weights.save(folder)
}

fn config(vocab_size: usize) -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_LORA,
        "kv_lora_rank": KV_LORA,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": V,
        "intermediate_size": DENSE,
        "moe_intermediate_size": EXPERT,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": true,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": false,
        "tie_word_embeddings": false,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
    })
}

/// Special tokens, every byte, every pair of lower-case letters: most of what the network draws at random is text.
fn vocabulary() -> Vec<String> {
    let letters = || ('a'..='z').map(String::from);
    let pairs = letters().flat_map(|a| letters().map(move |b| a.clone() + &b));
    SPECIAL
        .map(String::from)
        .into_iter()
        .chain(byte_characters())
        .chain(pairs)
        .collect()
}

/// The 256 characters that stand for bytes in byte-level vocabularies: printable ones for themselves, the others from
/// U+0100 on.
fn byte_characters() -> impl Iterator<Item = String> {
    let mut next = 0x100;
    (0..=255u8).map(move |byte| {
        let character = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("below the surrogates")
            }
        };
        character.into()
    })
}

fn tokenizer(vocabulary: &[String]) -> Value {
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect();
    let ids: serde_json::Map<String, Value> = vocabulary
        .iter()
        .enumerate()
        .skip(SPECIAL.len())
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let pairs = &vocabulary[SPECIAL.len() + 256..];
    let merges: Vec<String> = pairs
        .iter()
        .map(|pair| format!("{} {}", &pair[..1], &pair[1..]))
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        },
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": ids, "merges": merges,
        },
    })
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Draws tensors and remembers them by name.
struct Weights {
    random: SmallRng,
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    fn network(&mut self, vocab_size: usize) {
        self.plain("model.embed_tokens", &[vocab_size, HIDDEN], 0.0, 1.0);
        self.norm("model.norm", HIDDEN);
        self.plain("lm_head", &[vocab_size, HIDDEN], 0.0, 0.3);
        for layer in 0..=LAYERS {
            self.layer(&format!("model.layers.{layer}"), layer > 0);
        }
        let mtp = format!("model.layers.{LAYERS}");
        for name in ["enorm", "hnorm", "shared_head.norm"] {
            self.norm(&format!("{mtp}.{name}"), HIDDEN);
        }
        self.plain(&format!("{mtp}.eh_proj"), &[HIDDEN, 2 * HIDDEN], 0.0, 0.06);
    }

    fn layer(&mut self, layer: &str, moe: bool) {
        for name in ["input_layernorm", "post_attention_layernorm"] {
            self.norm(&format!("{layer}.{name}"), HIDDEN);
        }
        let attention = format!("{layer}.self_attn");
        self.linear(&format!("{attention}.q_a_proj"), Q_LORA, HIDDEN);
        self.norm(&format!("{attention}.q_a_layernorm"), Q_LORA);
        self.linear(
            &format!("{attention}.q_b_proj"),
            HEADS * (NOPE + ROPE),
            Q_LORA,
        );
        self.linear(
            &format!("{attention}.kv_a_proj_with_mqa"),
            KV_LORA + ROPE,
            HIDDEN,
        );
        self.norm(&format!("{attention}.kv_a_layernorm"), KV_LORA);
        self.linear(
            &format!("{attention}.kv_b_proj"),
            HEADS * (NOPE + V),
            KV_LORA,
        );
        self.linear(&format!("{attention}.o_proj"), HIDDEN, HEADS * V);
        let mlp = format!("{layer}.mlp");
        if !moe {
            return self.mlp(&mlp, DENSE);
        }
        self.plain(&format!("{mlp}.gate"), &[EXPERTS, HIDDEN], 0.0, 0.2);
        let bias: Vec<u8> = (0..EXPERTS)
            .flat_map(|_| (0.05 * self.normal()).to_le_bytes())
            .collect();
        let bias = Tensor {
            dtype: Dtype::F32,
            shape: vec![EXPERTS],
            bytes: bias,
        };
        self.tensors
            .insert(format!("{mlp}.gate.e_score_correction_bias"), bias);
        for expert in 0..EXPERTS {
            self.mlp(&format!("{mlp}.experts.{expert}"), EXPERT);
        }
        self.mlp(&format!("{mlp}.shared_experts"), EXPERT);
    }

    fn mlp(&mut self, name: &str, inter: usize) {
        self.linear(&format!("{name}.gate_proj"), inter, HIDDEN);
        self.linear(&format!("{name}.up_proj"), inter, HIDDEN);
        self.linear(&format!("{name}.down_proj"), HIDDEN, inter);
    }

    /// Irwin-Hall: close enough to a normal distribution, and the same on every platform.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.random.random::<f32>()).sum::<f32>() - 6.0
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.plain(name, &[width], 1.0, 0.1);
    }

    /// A BF16 tensor.
    fn plain(&mut self, name: &str, shape: &[usize], mean: f32, deviation: f32) {
        let values = shape.iter().product();
        let bytes = (0..values)
            .flat_map(|_| bf16::from_f32(mean + deviation * self.normal()).to_le_bytes())
            .collect();
        let tensor = Tensor {
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            bytes,
        };
        self.tensors.insert(format!("{name}.weight"), tensor);
    }

    /// An FP8 matrix and the scales of its blocks.
    fn linear(&mut self, name: &str, rows: usize, columns: usize) {
        let deviation = 1.6 / (columns as f32).sqrt();
        let blocks = [rows.div_ceil(BLOCK), columns.div_ceil(BLOCK)];
        // Six standard deviations reach the end of the range; blocks differ, as trained ones do.
        let scales: Vec<f32> = (0..blocks[0] * blocks[1])
            .map(|_| 6.0 * deviation / E4M3_MAX * (1.0 + self.random.random::<f32>()))
            .collect();
        let mut bytes = Vec::with_capacity(rows * columns);
        for row in 0..rows {
            for column in 0..columns {
                let scale = scales[row / BLOCK * blocks[1] + column / BLOCK];
                bytes.push(kernels::fp8::encode(deviation * self.normal() / scale));
            }
        }
        let shape = vec![rows, columns];
        let weight = Tensor {
            dtype: Dtype::F8_E4M3,
            shape,
            bytes,
        };
        self.tensors.insert(format!("{name}.weight"), weight);
        let bytes = scales
            .iter()
            .flat_map(|scale| scale.to_le_bytes())
            .collect();
        let scales = Tensor {
            dtype: Dtype::F32,
            shape: blocks.to_vec(),
            bytes,
        };
        self.tensors
            .insert(format!("{name}.weight_scale_inv"), scales);
    }

    /// Writes two shards and their index.
    fn save(self, folder: &Path) -> io::Result<()> {
        let half = self.tensors.len() / 2;
        let mut files = serde_json::Map::new();
        let mut total = 0;
        for (shard, range) in [(1, 0..half), (2, half..self.tensors.len())] {
            let file = format!("model-{shard:05}-of-00002.safetensors");
            let mut views = Vec::new();
            for (name, tensor) in self.tensors.iter().skip(range.start).take(range.len()) {
                let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
                views.push((name, view.map_err(io::Error::other)?));
                files.insert(name.clone(), file.clone().into());
                total += tensor.bytes.len();
            }
            safetensors::serialize_to_file(views, None, &folder.join(&file))
                .map_err(io::Error::other)?;
        }
        let index = json!({"metadata": {"total_size": total}, "weight_map": files});
        fs::write(
            folder.join("model.safetensors.index.json"),
            index.to_string(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkpoint_is_one_that_the_reader_accepts() {
        let folder = tempfile::tempdir().unwrap();
        write_tiny(folder.path(), 1).unwrap();
        let checkpoint = model::Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.config().vocab_size, vocabulary().len());
        assert!(checkpoint.config().mtp);
    }

    #[test]
    fn its_tokenizer_and_template_are_ones_that_the_router_accepts() {
        let folder = tempfile::tempdir().unwrap();
        write_tiny(folder.path(), 1).unwrap();
        let text = text::Text::load(folder.path()).unwrap();
        let message = |role, content: &str| openai::chat::Message {
            role,
            content: content.into(),
        };
        let turn = message(openai::chat::Role::User, "hi");
        let ids = text.encode_chat(&[turn], None, 1).unwrap();
        assert_eq!(ids[..2], [0, 3], "begin, user");
        assert_eq!(ids[3..], [4], "assistant, after a single token");
        assert_eq!(text.tokenizer().token_bytes(ids[2]), b"hi");
        assert_eq!(
            text.encode_prompt("\u{e4}!").unwrap().len(),
            4,
            "begin and three bytes"
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        let read = |seed| {
            let folder = tempfile::tempdir().unwrap();
            write_tiny(folder.path(), seed).unwrap();
            fs::read(folder.path().join("model-00001-of-00002.safetensors")).unwrap()
        };
        assert_eq!(read(1), read(1));
        assert_ne!(read(1), read(2));
    }
}
