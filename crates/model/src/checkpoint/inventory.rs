//! Every tensor a configuration asks for, with its shape: the one place that knows both (as DeepSeek-V3's index names them
//! and its `README_WEIGHTS.md` explains).

use super::{Checkpoint, ElementType, Error};
use crate::config::Config;

/// What a tensor may be stored as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A linear layer: FP8 with scales, BF16 or F32.
    Linear,
    /// A norm, the gate, the embedding: BF16 or F32.
    Plain,
}

/// Sees a tensor's name, shape and kind; its error ends the walk.
type See<'a> = dyn FnMut(&str, &[usize], Kind) -> Result<(), Error> + 'a;

/// Checks that each expected tensor is there in type and shape, and each FP8 one has its scales.
pub(super) fn check(checkpoint: &Checkpoint) -> Result<(), Error> {
    walk(checkpoint.config(), &mut |name, shape, kind| {
        check_one(checkpoint, name, shape, kind)
    })
}

fn check_one(
    checkpoint: &Checkpoint,
    name: &str,
    shape: &[usize],
    kind: Kind,
) -> Result<(), Error> {
    let entry = checkpoint
        .tensors
        .get(name)
        .ok_or_else(|| checkpoint.missing(name))?;
    if entry.shape != shape {
        let detail = format!(
            "shape {:?}, but the configuration means {shape:?}",
            entry.shape
        );
        return Err(checkpoint.flaw(entry, name, detail));
    }
    match (entry.dtype, kind) {
        (ElementType::F32 | ElementType::Bf16, _) => return Ok(()),
        (ElementType::F8E4M3, Kind::Linear) => {}
        (ElementType::F8E4M3, Kind::Plain) => {
            return Err(checkpoint.flaw(entry, name, "must not be FP8".into()));
        }
        (ElementType::Other(_), _) => {
            let detail = "element type is none of F8_E4M3, BF16 and F32".into();
            return Err(checkpoint.flaw(entry, name, detail));
        }
    }
    let scales = format!("{name}_scale_inv");
    let Some(scale) = checkpoint.tensors.get(&scales) else {
        return Err(checkpoint.missing(&scales));
    };
    let blocks: Vec<usize> = shape.iter().map(|dim| dim.div_ceil(128)).collect();
    if scale.dtype != ElementType::F32 {
        return Err(checkpoint.flaw(scale, &scales, "element type is not F32".into()));
    }
    if scale.shape != blocks {
        let detail = format!(
            "shape {:?}, but the weight's blocks are {blocks:?}",
            scale.shape
        );
        return Err(checkpoint.flaw(scale, &scales, detail));
    }
    Ok(())
}

fn walk(config: &Config, see: &mut See<'_>) -> Result<(), Error> {
    let hidden = config.hidden_size;
    see(
        "model.embed_tokens.weight",
        &[config.vocab_size, hidden],
        Kind::Plain,
    )?;
    see("model.norm.weight", &[hidden], Kind::Plain)?;
    if !config.tied_embeddings {
        see("lm_head.weight", &[config.vocab_size, hidden], Kind::Linear)?;
    }
    for layer in 0..config.kv_layers(true) {
        decoder_layer(config, layer, see)?;
    }
    if config.mtp {
        let layer = format!("model.layers.{}", config.layers);
        for norm in ["enorm", "hnorm", "shared_head.norm"] {
            see(&format!("{layer}.{norm}.weight"), &[hidden], Kind::Plain)?;
        }
        see(
            &format!("{layer}.eh_proj.weight"),
            &[hidden, 2 * hidden],
            Kind::Linear,
        )?;
    }
    Ok(())
}

fn decoder_layer(config: &Config, layer: usize, see: &mut See<'_>) -> Result<(), Error> {
    let hidden = config.hidden_size;
    let a = &config.attention;
    let layer_name = format!("model.layers.{layer}");
    let mut at = |name: &str, shape: &[usize], kind| {
        see(&format!("{layer_name}.{name}.weight"), shape, kind)
    };
    at("input_layernorm", &[hidden], Kind::Plain)?;
    at("post_attention_layernorm", &[hidden], Kind::Plain)?;
    match a.q_lora_rank {
        None => at(
            "self_attn.q_proj",
            &[a.heads * a.qk(), hidden],
            Kind::Linear,
        )?,
        Some(rank) => {
            at("self_attn.q_a_proj", &[rank, hidden], Kind::Linear)?;
            at("self_attn.q_a_layernorm", &[rank], Kind::Plain)?;
            at(
                "self_attn.q_b_proj",
                &[a.heads * a.qk(), rank],
                Kind::Linear,
            )?;
        }
    }
    at(
        "self_attn.kv_a_proj_with_mqa",
        &[a.entry(), hidden],
        Kind::Linear,
    )?;
    at("self_attn.kv_a_layernorm", &[a.kv_lora_rank], Kind::Plain)?;
    at(
        "self_attn.kv_b_proj",
        &[a.heads * (a.nope + a.v), a.kv_lora_rank],
        Kind::Linear,
    )?;
    at("self_attn.o_proj", &[hidden, a.heads * a.v], Kind::Linear)?;
    let mut mlp = |name: &str, inter: usize| {
        at(&format!("{name}.gate_proj"), &[inter, hidden], Kind::Linear)?;
        at(&format!("{name}.up_proj"), &[inter, hidden], Kind::Linear)?;
        at(&format!("{name}.down_proj"), &[hidden, inter], Kind::Linear)
    };
    match &config.moe {
        Some(moe) if config.is_moe(layer) => {
            for expert in 0..moe.gate.experts {
                mlp(&format!("mlp.experts.{expert}"), moe.inter)?;
            }
            if moe.shared > 0 {
                mlp("mlp.shared_experts", moe.shared * moe.inter)?;
            }
            at("mlp.gate", &[moe.gate.experts, hidden], Kind::Plain)?;
            let bias = format!("{layer_name}.mlp.gate.e_score_correction_bias");
            see(&bias, &[moe.gate.experts], Kind::Plain)
        }
        _ => mlp("mlp", config.dense_inter),
    }
}
