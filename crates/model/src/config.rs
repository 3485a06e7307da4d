//! `config.json` of a released checkpoint as a typed, checked [`Config`]. Every size of the network comes from here.
//!
//! Both spellings in use are read: the released one (`rope_scaling`, `rope_theta`, `torch_dtype`) and the one recent
//! `transformers` writes (`rope_parameters`, `dtype`).

use std::{fs, path::Path};

use kernels::backend::{GateShape, ScaleFormat};
use serde::Deserialize;

use crate::rope::{Rope, RopeJson};

/// Epsilon of the norms of the query and key-value latents: fixed, not `rms_norm_eps`, as in DeepSeek's code.
pub const LATENT_NORM_EPS: f32 = 1e-6;

/// Largest config.json that is read.
const MAX_BYTES: u64 = 16 << 20;

/// Why a configuration is refused. Always names the field.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not the JSON that is expected.
    #[error("config.json")]
    Json(#[from] serde_json::Error),
    /// A value is missing, absurd, or means a network this is not.
    #[error("config.json: {field}: {detail}")]
    Value {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        detail: String,
    },
}

/// A DeepSeek-V3 network's sizes and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers of the trunk.
    pub layers: usize,
    /// Whether layer `num_hidden_layers` is an MTP layer. Modules beyond the first are not used.
    pub mtp: bool,
    /// Attention.
    pub attention: Attention,
    /// Intermediate width of dense layers.
    pub dense_inter: usize,
    /// Experts; `None` for a network of dense layers only.
    pub moe: Option<Moe>,
    /// Layers before this are dense.
    pub first_dense: usize,
    /// Of the layers after, those whose number this divides have experts.
    pub moe_layer_freq: usize,
    /// Epsilon of the norms around attention and experts, and of the last one.
    pub rms_norm_eps: f32,
    /// The head is the embedding.
    pub tied_embeddings: bool,
    /// How FP8 weights are stored, if they are.
    pub quantisation: Option<Quantisation>,
    /// Longest sequence the network was made for.
    pub max_position_embeddings: usize,
}

/// Multi-head latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Heads.
    pub heads: usize,
    /// Rank of the query's latent; `None`: queries come straight from the residual stream.
    pub q_lora_rank: Option<usize>,
    /// Width of the cached latent.
    pub kv_lora_rank: usize,
    /// Values of a head's query and key without position.
    pub nope: usize,
    /// Values of a head's query and of the shared key that are rotated.
    pub rope: usize,
    /// Values of a head's output.
    pub v: usize,
    /// Rotation.
    pub rotary: Rope,
}

/// Routed and shared experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Routed experts, groups, top-k, factor.
    pub gate: Gate,
    /// Intermediate width of one expert.
    pub inter: usize,
    /// Shared experts: one MLP of `shared * inter`.
    pub shared: usize,
}

/// The gate's parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    /// Routed experts.
    pub experts: usize,
    /// Groups of contiguous experts.
    pub groups: usize,
    /// Groups kept.
    pub top_groups: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Factor on the weights.
    pub scale: f32,
    /// Whether the chosen scores are divided by their sum.
    pub normalise: bool,
}

impl Gate {
    /// As the kernels take it.
    pub fn shape(&self) -> GateShape {
        GateShape {
            experts: self.experts,
            groups: self.groups,
            top_groups: self.top_groups,
            top_k: self.top_k,
            scale: self.scale,
            normalise: self.normalise,
        }
    }
}

/// FP8 E4M3 blocks of 128 x 128 with float32 scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantisation {
    /// How activation scales are rounded.
    pub scale_format: ScaleFormat,
}

impl Attention {
    /// Width of a head's query and key.
    pub fn qk(&self) -> usize {
        self.nope + self.rope
    }
    /// Values of a cache entry.
    pub fn entry(&self) -> usize {
        self.kv_lora_rank + self.rope
    }
    /// Factor on attention scores, the same in both forms.
    pub fn scale(&self) -> f32 {
        ((self.qk() as f64).powf(-0.5) * self.rotary.softmax_factor()) as f32
    }
}

impl Config {
    /// Reads and checks `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// [`Error`], naming the field.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("config.json");
        let read = |source| Error::Read {
            path: path.display().to_string(),
            source,
        };
        if fs::metadata(&path).map_err(read)?.len() > MAX_BYTES {
            return Err(value("size", "larger than any configuration".into()));
        }
        Self::parse(&fs::read(&path).map_err(read)?)
    }

    /// Checks the bytes of a `config.json`.
    ///
    /// # Errors
    /// [`Error`], naming the field.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        serde_json::from_slice::<Json>(bytes)?.check()
    }

    /// Whether trunk layer (or MTP layer) `layer` has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.moe.is_some() && layer >= self.first_dense && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// Layers whose latents are cached when the MTP layer is filled or not.
    pub fn kv_layers(&self, with_mtp: bool) -> usize {
        self.layers + usize::from(with_mtp && self.mtp)
    }
}

/// The fields as they stand in the file.
#[derive(Deserialize)]
struct Json {
    model_type: Option<String>,
    vocab_size: Option<i64>,
    hidden_size: Option<i64>,
    num_hidden_layers: Option<i64>,
    #[serde(alias = "num_mtp_layers")]
    num_nextn_predict_layers: Option<i64>,
    num_attention_heads: Option<i64>,
    q_lora_rank: Option<i64>,
    kv_lora_rank: Option<i64>,
    qk_nope_head_dim: Option<i64>,
    qk_rope_head_dim: Option<i64>,
    v_head_dim: Option<i64>,
    intermediate_size: Option<i64>,
    moe_intermediate_size: Option<i64>,
    n_routed_experts: Option<i64>,
    n_shared_experts: Option<i64>,
    n_group: Option<i64>,
    topk_group: Option<i64>,
    num_experts_per_tok: Option<i64>,
    routed_scaling_factor: Option<f64>,
    norm_topk_prob: Option<bool>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    first_k_dense_replace: Option<i64>,
    moe_layer_freq: Option<i64>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    rope_interleave: Option<bool>,
    tie_word_embeddings: Option<bool>,
    max_position_embeddings: Option<i64>,
    quantization_config: Option<QuantisationJson>,
    #[serde(flatten)]
    rope: RopeJson,
}

#[derive(Deserialize)]
struct QuantisationJson {
    quant_method: Option<String>,
    fmt: Option<String>,
    activation_scheme: Option<String>,
    weight_block_size: Option<Vec<i64>>,
    scale_fmt: Option<String>,
}

pub(crate) fn value(field: &'static str, detail: String) -> Error {
    Error::Value { field, detail }
}

/// A size that must be there, at least `min` and at most what any network of this kind could have.
fn size(field: &'static str, given: Option<i64>, min: i64, max: i64) -> Result<usize, Error> {
    let given = given.ok_or_else(|| value(field, "missing".into()))?;
    if (min..=max).contains(&given) {
        Ok(given as usize)
    } else {
        Err(value(field, format!("{given} is not in {min}..={max}")))
    }
}

/// A word that must be one of those that mean DeepSeek-V3, where it stands at all.
fn word(field: &'static str, given: Option<&str>, allowed: &[&str]) -> Result<(), Error> {
    match given {
        Some(given) if !allowed.contains(&given) => Err(value(
            field,
            format!("\"{given}\" is not supported (only {})", allowed.join(", ")),
        )),
        _ => Ok(()),
    }
}

/// Largest width or count that is believed: no product of two overflows.
const WIDTH: i64 = 1 << 20;

impl Json {
    fn check(self) -> Result<Config, Error> {
        word("model_type", self.model_type.as_deref(), &["deepseek_v3"])?;
        word("hidden_act", self.hidden_act.as_deref(), &["silu"])?;
        if self.attention_bias == Some(true) {
            return Err(value("attention_bias", "biases are not supported".into()));
        }
        if self.rope_interleave == Some(false) {
            return Err(value(
                "rope_interleave",
                "only interleaved pairs are supported".into(),
            ));
        }
        let layers = size("num_hidden_layers", self.num_hidden_layers, 1, 4096)?;
        let first_dense = match self.first_k_dense_replace {
            None => 0,
            given => size("first_k_dense_replace", given, 0, 4096)?,
        };
        let moe = self.moe()?;
        let has_dense = moe.is_none() || first_dense > 0 || self.moe_layer_freq.unwrap_or(1) > 1;
        let eps = self.rms_norm_eps.unwrap_or(1e-6);
        if !(eps > 0.0 && eps < 1.0) {
            return Err(value(
                "rms_norm_eps",
                format!("{eps} is not between 0 and 1"),
            ));
        }
        Ok(Config {
            vocab_size: size("vocab_size", self.vocab_size, 1, 1 << 24)?,
            hidden_size: size("hidden_size", self.hidden_size, 1, WIDTH)?,
            layers,
            mtp: match self.num_nextn_predict_layers {
                None => false,
                given => size("num_nextn_predict_layers", given, 0, 64)? > 0,
            },
            attention: self.attention()?,
            dense_inter: if has_dense {
                size("intermediate_size", self.intermediate_size, 1, WIDTH)?
            } else {
                0
            },
            moe,
            first_dense,
            moe_layer_freq: match self.moe_layer_freq {
                None => 1,
                given => size("moe_layer_freq", given, 1, 4096)?,
            },
            rms_norm_eps: eps as f32,
            tied_embeddings: self.tie_word_embeddings.unwrap_or(false),
            quantisation: self
                .quantization_config
                .as_ref()
                .map(QuantisationJson::check)
                .transpose()?,
            max_position_embeddings: match self.max_position_embeddings {
                None => 4096,
                given => size("max_position_embeddings", given, 1, 1 << 30)?,
            },
        })
    }

    fn attention(&self) -> Result<Attention, Error> {
        let rope = size("qk_rope_head_dim", self.qk_rope_head_dim, 2, 1 << 14)?;
        if !rope.is_multiple_of(2) {
            return Err(value("qk_rope_head_dim", format!("{rope} is odd")));
        }
        Ok(Attention {
            heads: size("num_attention_heads", self.num_attention_heads, 1, 1 << 14)?,
            q_lora_rank: match self.q_lora_rank {
                None => None,
                given => Some(size("q_lora_rank", given, 1, WIDTH)?),
            },
            kv_lora_rank: size("kv_lora_rank", self.kv_lora_rank, 1, WIDTH)?,
            nope: size("qk_nope_head_dim", self.qk_nope_head_dim, 1, 1 << 14)?,
            rope,
            v: size("v_head_dim", self.v_head_dim, 1, 1 << 14)?,
            rotary: self.rope.check(rope, self.max_position_embeddings)?,
        })
    }

    fn moe(&self) -> Result<Option<Moe>, Error> {
        let experts = match self.n_routed_experts {
            None | Some(0) => return Ok(None),
            given => size("n_routed_experts", given, 1, 1 << 16)?,
        };
        word("scoring_func", self.scoring_func.as_deref(), &["sigmoid"])?;
        word("topk_method", self.topk_method.as_deref(), &["noaux_tc"])?;
        let groups = size("n_group", self.n_group.or(Some(1)), 1, experts as i64)?;
        let top_groups = size("topk_group", self.topk_group.or(Some(1)), 1, groups as i64)?;
        if !experts.is_multiple_of(groups) {
            let detail = format!("{experts} experts do not divide into {groups} groups");
            return Err(value("n_group", detail));
        }
        let candidates = experts / groups * top_groups;
        let top_k = size(
            "num_experts_per_tok",
            self.num_experts_per_tok,
            1,
            candidates as i64,
        )?;
        let scale = self.routed_scaling_factor.unwrap_or(1.0);
        if !(scale.is_finite() && scale > 0.0) {
            return Err(value(
                "routed_scaling_factor",
                format!("{scale} is not positive"),
            ));
        }
        Ok(Some(Moe {
            gate: Gate {
                experts,
                groups,
                top_groups,
                top_k,
                scale: scale as f32,
                normalise: self.norm_topk_prob.unwrap_or(true),
            },
            inter: size(
                "moe_intermediate_size",
                self.moe_intermediate_size,
                1,
                WIDTH,
            )?,
            shared: match self.n_shared_experts {
                None => 0,
                given => size("n_shared_experts", given, 0, 1024)?,
            },
        }))
    }
}

impl QuantisationJson {
    fn check(&self) -> Result<Quantisation, Error> {
        word(
            "quantization_config.quant_method",
            self.quant_method.as_deref(),
            &["fp8"],
        )?;
        word(
            "quantization_config.fmt",
            self.fmt.as_deref(),
            &["e4m3", "float8_e4m3fn"],
        )?;
        word(
            "quantization_config.activation_scheme",
            self.activation_scheme.as_deref(),
            &["dynamic"],
        )?;
        if let Some(block) = &self.weight_block_size
            && block[..] != [128, 128]
        {
            let detail = format!("{block:?} is not [128, 128]");
            return Err(value("quantization_config.weight_block_size", detail));
        }
        word(
            "quantization_config.scale_fmt",
            self.scale_fmt.as_deref(),
            &["ue8m0", "float"],
        )?;
        Ok(Quantisation {
            scale_format: match self.scale_fmt.as_deref() {
                Some("ue8m0") => ScaleFormat::Ue8m0,
                _ => ScaleFormat::F32,
            },
        })
    }
}

#[cfg(test)]
mod tests;
