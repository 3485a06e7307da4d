//! A checkpoint's weights in the form a backend computes with, layer by layer, under the checkpoint's own names.

use kernels::{
    Backend, DType, Precision, Tensor,
    backend::{HostMatrix, ScaleFormat},
};

use crate::{
    Error,
    checkpoint::{self, Checkpoint, Matrix},
    config::{self, Config},
};

/// A linear layer and how its input must come.
pub(crate) struct Linear<B: Backend> {
    pub(crate) weight: B::Linear,
    /// The product is of FP8 with FP8: the input comes quantised.
    pub(crate) quantised: bool,
}

/// Gate and up projection in one, and down projection.
pub(crate) struct Mlp<B: Backend> {
    pub(crate) gate_up: Linear<B>,
    pub(crate) down: Linear<B>,
}

/// How queries and the cache entry come out of the residual stream.
pub(crate) enum Projection<B: Backend> {
    /// `q_a | kv_a` in one product, then the query's latent through `q_b`.
    LowRank {
        qkv_a: Linear<B>,
        q_norm: Tensor<B::Mem>,
        q_b: Linear<B>,
    },
    /// Queries straight from the residual stream.
    Direct { q: Linear<B>, kv_a: Linear<B> },
}

/// Multi-head latent attention.
pub(crate) struct Attention<B: Backend> {
    pub(crate) projection: Projection<B>,
    pub(crate) kv_norm: Tensor<B::Mem>,
    /// `[heads, latent, nope]`: queries into the latent space (absorbed form).
    pub(crate) w_uk: B::Heads,
    /// `[heads, v, latent]`: out of the latent space (absorbed form).
    pub(crate) w_uv: B::Heads,
    /// Latents to keys and values (expanded form); never with quantised inputs, so that both forms see the same latents.
    pub(crate) kv_b: Linear<B>,
    pub(crate) o: Linear<B>,
}

/// Routed and shared experts.
pub(crate) struct Moe<B: Backend> {
    pub(crate) gate: Tensor<B::Mem>,
    pub(crate) bias: Tensor<B::Mem>,
    /// Logical expert to slots, see `Backend::dispatch`.
    pub(crate) slot_of_expert: Tensor<B::Mem>,
    pub(crate) slots: usize,
    pub(crate) experts: B::Experts,
    pub(crate) quantised: bool,
    pub(crate) shared: Option<Mlp<B>>,
}

/// What stands after attention.
pub(crate) enum FeedForward<B: Backend> {
    Dense(Mlp<B>),
    Moe(Moe<B>),
}

/// A decoder layer.
pub(crate) struct Layer<B: Backend> {
    pub(crate) input_norm: Tensor<B::Mem>,
    pub(crate) attention: Attention<B>,
    pub(crate) post_norm: Tensor<B::Mem>,
    pub(crate) feed_forward: FeedForward<B>,
}

/// What the MTP layer has beside a decoder layer. Embedding and head are the trunk's.
pub(crate) struct Mtp<B: Backend> {
    pub(crate) embedding_norm: Tensor<B::Mem>,
    pub(crate) hidden_norm: Tensor<B::Mem>,
    pub(crate) eh_proj: Linear<B>,
    pub(crate) layer: Layer<B>,
    pub(crate) head_norm: Tensor<B::Mem>,
}

/// Everything but the MTP layer.
pub(crate) struct Trunk<B: Backend> {
    pub(crate) embedding: Tensor<B::Mem>,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) norm: Tensor<B::Mem>,
    pub(crate) head: Linear<B>,
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Layers loaded.
    pub layers: usize,
    /// Layers to load.
    pub total: usize,
}

/// Takes weights from a checkpoint into a backend.
pub(crate) struct Loader<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) precision: Precision,
}

impl<B: Backend> Loader<'_, B> {
    pub(crate) fn trunk(&self, on_layer: &mut dyn FnMut(usize)) -> Result<Trunk<B>, Error> {
        let config = self.checkpoint.config();
        let embedding = "model.embed_tokens.weight";
        let head = if config.tied_embeddings {
            embedding
        } else {
            "lm_head.weight"
        };
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(self.layer(layer)?);
            on_layer(layer + 1);
        }
        Ok(Trunk {
            embedding: self.activation_table(embedding)?,
            layers,
            norm: self.vector("model.norm.weight")?,
            // The head is never computed with quantised activations (report 3.3).
            head: self.linear_as(&[head], self.precision_of_heads())?,
        })
    }

    pub(crate) fn mtp(&self) -> Result<Mtp<B>, Error> {
        let layer = self.checkpoint.config().layers;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        Ok(Mtp {
            embedding_norm: self.vector(&name("enorm"))?,
            hidden_norm: self.vector(&name("hnorm"))?,
            eh_proj: self.linear_as(&[&name("eh_proj")], self.precision_of_heads())?,
            layer: self.layer(layer)?,
            head_norm: self.vector(&name("shared_head.norm"))?,
        })
    }

    fn layer(&self, layer: usize) -> Result<Layer<B>, Error> {
        let config = self.checkpoint.config();
        let prefix = format!("model.layers.{layer}");
        Ok(Layer {
            input_norm: self.vector(&format!("{prefix}.input_layernorm.weight"))?,
            attention: self.attention(&format!("{prefix}.self_attn"), &config.attention)?,
            post_norm: self.vector(&format!("{prefix}.post_attention_layernorm.weight"))?,
            feed_forward: match &config.moe {
                Some(moe) if config.is_moe(layer) => {
                    FeedForward::Moe(self.moe(&format!("{prefix}.mlp"), moe, config)?)
                }
                _ => FeedForward::Dense(self.mlp(&format!("{prefix}.mlp"))?),
            },
        })
    }

    fn attention(&self, prefix: &str, sizes: &config::Attention) -> Result<Attention<B>, Error> {
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let kv_a = name("kv_a_proj_with_mqa");
        let projection = match sizes.q_lora_rank {
            Some(_) => Projection::LowRank {
                qkv_a: self.linear(&[&name("q_a_proj"), &kv_a])?,
                q_norm: self.vector(&name("q_a_layernorm"))?,
                q_b: self.linear(&[&name("q_b_proj")])?,
            },
            None => Projection::Direct {
                q: self.linear(&[&name("q_proj")])?,
                kv_a: self.linear(&[&kv_a])?,
            },
        };
        let kv_b = name("kv_b_proj");
        let (w_uk, w_uv) = split_kv_b(&self.checkpoint.matrix(&kv_b)?.to_f32(), sizes);
        let (heads, latent) = (sizes.heads, sizes.kv_lora_rank);
        let precision = self.precision_of_heads();
        Ok(Attention {
            projection,
            kv_norm: self.vector(&name("kv_a_layernorm"))?,
            w_uk: self
                .backend
                .heads(heads, latent, sizes.nope, &w_uk, precision)?,
            w_uv: self
                .backend
                .heads(heads, sizes.v, latent, &w_uv, precision)?,
            kv_b: self.linear_as(&[&kv_b], precision)?,
            o: self.linear(&[&name("o_proj")])?,
        })
    }

    fn mlp(&self, prefix: &str) -> Result<Mlp<B>, Error> {
        let name = |part: &str| format!("{prefix}.{part}_proj.weight");
        Ok(Mlp {
            gate_up: self.linear(&[&name("gate"), &name("up")])?,
            down: self.linear(&[&name("down")])?,
        })
    }

    fn moe(&self, prefix: &str, sizes: &config::Moe, config: &Config) -> Result<Moe<B>, Error> {
        let count = sizes.gate.experts;
        let first = self
            .checkpoint
            .matrix(&format!("{prefix}.experts.0.gate_proj.weight"))?;
        let precision = kept_form(self.precision, first.dtype);
        let mut experts =
            self.backend
                .experts(count, config.hidden_size, sizes.inter, precision)?;
        for expert in 0..count {
            self.expert(
                &mut experts,
                expert,
                &format!("{prefix}.experts.{expert}"),
                precision,
            )?;
        }
        let identity: Vec<i32> = (0..count as i32).flat_map(|expert| [1, expert]).collect();
        let gate = self.checkpoint.matrix(&format!("{prefix}.gate.weight"))?;
        Ok(Moe {
            gate: self.import_f32(&gate)?,
            bias: self.vector(&format!("{prefix}.gate.e_score_correction_bias"))?,
            slot_of_expert: self.backend.import(
                DType::I32,
                count,
                2,
                bytemuck::cast_slice(&identity),
            )?,
            slots: count,
            experts,
            quantised: precision == Precision::W8A8,
            shared: match sizes.shared {
                0 => None,
                _ => Some(self.mlp(&format!("{prefix}.shared_experts"))?),
            },
        })
    }

    /// Loads one expert's weights into one slot.
    fn expert(
        &self,
        experts: &mut B::Experts,
        slot: usize,
        prefix: &str,
        precision: Precision,
    ) -> Result<(), Error> {
        let take = |part: &str| {
            let matrix = self
                .checkpoint
                .matrix(&format!("{prefix}.{part}_proj.weight"))?;
            // FP8 forms hold FP8 weights only: one expert stored otherwise is an error of the checkpoint's maker.
            if matches!(precision, Precision::W8 | Precision::W8A8) && matrix.dtype != DType::Fp8 {
                return Err(checkpoint::Error::Tensor {
                    file: self.checkpoint.directory().display().to_string(),
                    tensor: format!("{prefix}.{part}_proj.weight"),
                    detail: "is not FP8, but expert 0 of its layer is".into(),
                });
            }
            Ok(matrix)
        };
        let (gate, up, down) = (take("gate")?, take("up")?, take("down")?);
        self.backend
            .load_expert(experts, slot, &gate.host(), &up.host(), &down.host())?;
        Ok(())
    }

    /// What is computed with plain activations whatever the precision: head, latent up-projections, the MTP input.
    fn precision_of_heads(&self) -> Precision {
        match self.precision {
            Precision::F32 => Precision::F32,
            _ => Precision::Bf16,
        }
    }

    fn linear(&self, names: &[&str]) -> Result<Linear<B>, Error> {
        self.linear_as(names, self.precision)
    }

    fn linear_as(&self, names: &[&str], precision: Precision) -> Result<Linear<B>, Error> {
        let mut parts = names
            .iter()
            .map(|name| self.checkpoint.matrix(name))
            .collect::<Result<Vec<Matrix<'_>>, _>>()?;
        if parts.iter().any(|part| part.dtype != parts[0].dtype) {
            parts = parts.iter().map(Matrix::widened).collect();
        }
        let precision = kept_form(precision, parts[0].dtype);
        let parts: Vec<HostMatrix<'_>> = parts.iter().map(Matrix::host).collect();
        Ok(Linear {
            weight: self.backend.linear(&parts, precision)?,
            quantised: precision == Precision::W8A8,
        })
    }

    fn vector(&self, name: &str) -> Result<Tensor<B::Mem>, Error> {
        self.import_f32(&self.checkpoint.matrix(name)?)
    }

    fn import_f32(&self, matrix: &Matrix<'_>) -> Result<Tensor<B::Mem>, Error> {
        let values = matrix.to_f32();
        let bytes = bytemuck::cast_slice(&values);
        Ok(self
            .backend
            .import(DType::F32, matrix.rows, matrix.cols, bytes)?)
    }

    /// The embedding table, in the type of the residual stream.
    fn activation_table(&self, name: &str) -> Result<Tensor<B::Mem>, Error> {
        let matrix = self.checkpoint.matrix(name)?;
        match self.backend.activation(self.precision) {
            DType::Bf16 if matrix.dtype == DType::Bf16 => {
                Ok(self
                    .backend
                    .import(DType::Bf16, matrix.rows, matrix.cols, &matrix.data)?)
            }
            DType::Bf16 => {
                let values: Vec<half::bf16> = matrix
                    .to_f32()
                    .into_iter()
                    .map(half::bf16::from_f32)
                    .collect();
                let bytes = bytemuck::cast_slice(&values);
                Ok(self
                    .backend
                    .import(DType::Bf16, matrix.rows, matrix.cols, bytes)?)
            }
            _ => self.import_f32(&matrix),
        }
    }
}

/// The form a matrix of type `dtype` is kept in: FP8 forms are for FP8 weights, what else stands in such a checkpoint
/// is BF16.
fn kept_form(precision: Precision, dtype: DType) -> Precision {
    match precision {
        Precision::W8 | Precision::W8A8 if dtype != DType::Fp8 => Precision::Bf16,
        other => other,
    }
}

/// Cuts `kv_b` `[heads * (nope + v), latent]` into `W_UK^T` `[heads, latent, nope]` and `W_UV` `[heads, v, latent]`.
fn split_kv_b(kv_b: &[f32], sizes: &config::Attention) -> (Vec<f32>, Vec<f32>) {
    let (nope, v, latent) = (sizes.nope, sizes.v, sizes.kv_lora_rank);
    let mut w_uk = Vec::with_capacity(sizes.heads * latent * nope);
    let mut w_uv = Vec::with_capacity(sizes.heads * v * latent);
    for head in kv_b.chunks_exact((nope + v) * latent) {
        let (keys, values) = head.split_at(nope * latent);
        for column in 0..latent {
            w_uk.extend(keys.iter().skip(column).step_by(latent));
        }
        w_uv.extend_from_slice(values);
    }
    (w_uk, w_uv)
}

/// How activations are quantised for this checkpoint.
pub(crate) fn scale_format(config: &Config) -> ScaleFormat {
    config
        .quantisation
        .map_or(ScaleFormat::F32, |quantisation| quantisation.scale_format)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rope::Rope;

    #[test]
    fn kv_b_is_cut_by_heads_and_its_key_part_transposed() {
        let sizes = config::Attention {
            heads: 2,
            q_lora_rank: None,
            kv_lora_rank: 3,
            nope: 2,
            rope: 2,
            v: 1,
            rotary: Rope::plain(2, 10_000.0),
        };
        let kv_b: Vec<f32> = (0u8..18).map(f32::from).collect();
        let (w_uk, w_uv) = split_kv_b(&kv_b, &sizes);
        assert_eq!(w_uk, [0., 3., 1., 4., 2., 5., 9., 12., 10., 13., 11., 14.]);
        assert_eq!(w_uv, [6., 7., 8., 15., 16., 17.]);
    }

    #[test]
    fn only_fp8_weights_are_kept_in_fp8_forms() {
        assert_eq!(kept_form(Precision::W8A8, DType::Bf16), Precision::Bf16);
        assert_eq!(kept_form(Precision::W8A8, DType::Fp8), Precision::W8A8);
        assert_eq!(kept_form(Precision::Bf16, DType::Fp8), Precision::Bf16);
        assert_eq!(kept_form(Precision::F32, DType::Fp8), Precision::F32);
    }
}
