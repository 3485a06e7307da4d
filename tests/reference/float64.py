"""The DeepSeek-V3 network in float64, written from the report alone: the judge of every other implementation.

Norms, softmax, gate and products are all float64. Rotations use float32 angles, as every implementation does.
`activations="f32"` or `"ue8m0"` quantises the inputs of FP8 weights 1 x 128 as W8A8 does, with exact products: the
judge of W8A8, whose rounding of activations is part of the network it computes.
"""

import math

import torch

from checkpoint import BLOCK, FP8_MAX, dequantised


def frequencies(config):
    """Radians per position of each pair, the factor on cosine and sine, and the factor on attention scores."""
    dim = config["qk_rope_head_dim"]
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling.get("rope_type", scaling.get("type", "default")) != "yarn":
        return 1.0 / periods, 1.0, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair(scaling.get("beta_slow") or 1)), dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp

    def mscale(m):
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    m, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = mscale(m) / mscale(all_dim) if m and all_dim else mscale(1)
    softmax = mscale(all_dim) ** 2 if all_dim else 1.0
    return 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep, amplitude, softmax


def quantise_activations(x, scale_format):
    """What x becomes when it is quantised per token and 128 channels."""
    pad = -x.shape[-1] % BLOCK
    blocks = torch.nn.functional.pad(x, (0, pad)).float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4) / FP8_MAX
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)
        # frexp's mantissa is in [0.5, 1): exactly 0.5 is a power of two already.
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (values.double() * scale.double()).flatten(-2)[..., : x.shape[-1]]


class Network:
    def __init__(self, config, tensors, activations=None):
        self.config, self.activations = config, activations
        self.fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
        self.weights = dequantised(tensors, torch.float64)
        self.eps = config.get("rms_norm_eps", 1e-6)

    def linear(self, name, x, quantise=True):
        name = f"{name}.weight"
        if quantise and self.activations and name in self.fp8:
            x = quantise_activations(x, self.activations)
        return x @ self.weights[name].T

    def norm(self, name, x, eps=None):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.eps if eps is None else eps))
        return x * scale * self.weights[f"{name}.weight"]

    def mlp(self, prefix, x):
        gate = torch.nn.functional.silu(self.linear(f"{prefix}.gate_proj", x))
        return self.linear(f"{prefix}.down_proj", gate * self.linear(f"{prefix}.up_proj", x))

    def rotate(self, x, positions):
        """Neighbours (2i, 2i + 1) form a pair; x is [T, ..., rope]."""
        rate, amplitude, _ = frequencies(self.config)
        angle = (positions.float()[:, None] * rate).double()
        angle = angle.view(len(positions), *[1] * (x.dim() - 2), -1)
        cos, sin = angle.cos() * amplitude, angle.sin() * amplitude
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def attention(self, prefix, x, positions):
        c, rows = self.config, len(positions)
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c.get("q_lora_rank") is None:
            q = self.linear(f"{prefix}.q_proj", x)
        else:
            q = self.norm(f"{prefix}.q_a_layernorm", self.linear(f"{prefix}.q_a_proj", x), 1e-6)
            q = self.linear(f"{prefix}.q_b_proj", q)
        q = q.view(rows, heads, nope + rope)
        q_rope = self.rotate(q[..., nope:], positions)
        kv = self.linear(f"{prefix}.kv_a_proj_with_mqa", x)
        latent = self.norm(f"{prefix}.kv_a_layernorm", kv[:, : c["kv_lora_rank"]], 1e-6)
        rope_key = self.rotate(kv[:, c["kv_lora_rank"] :], positions)
        # The up-projection of latents never has quantised inputs.
        expanded = self.linear(f"{prefix}.kv_b_proj", latent, quantise=False)
        expanded = expanded.view(rows, heads, nope + c["v_head_dim"])
        scores = torch.einsum("qhd,khd->hqk", q[..., :nope], expanded[..., :nope])
        scores = scores + torch.einsum("qhd,kd->hqk", q_rope, rope_key)
        scores = scores * (nope + rope) ** -0.5 * frequencies(c)[2]
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, expanded[..., nope:]).flatten(1)
        return self.linear(f"{prefix}.o_proj", mixed), latent, rope_key

    def gate(self, prefix, x):
        c = self.config
        scores = torch.sigmoid(x @ self.weights[f"{prefix}.gate.weight"].T)
        choice = scores + self.weights[f"{prefix}.gate.e_score_correction_bias"]
        grouped = choice.view(len(x), c.get("n_group") or 1, -1)
        best_two = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1)
        kept = best_two.topk(c.get("topk_group") or 1, dim=-1)[1]
        mask = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(mask[..., None], -math.inf).flatten(1)
        ids = choice.topk(c["num_experts_per_tok"], dim=-1)[1]
        weights = scores.gather(1, ids)
        if c.get("norm_topk_prob", True):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * c["routed_scaling_factor"]

    def moe(self, prefix, x):
        ids, weights = self.gate(prefix, x)
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, k = (ids == expert).nonzero(as_tuple=True)
            out[token] += weights[token, k, None] * self.mlp(f"{prefix}.experts.{expert}", x[token])
        if self.config.get("n_shared_experts"):
            out = out + self.mlp(f"{prefix}.shared_experts", x)
        return out, ids, weights

    def is_moe(self, layer):
        c = self.config
        return layer >= c["first_k_dense_replace"] and layer % c.get("moe_layer_freq", 1) == 0

    def layer(self, layer, h, positions, out):
        p = f"model.layers.{layer}"
        x = self.norm(f"{p}.input_layernorm", h)
        attended, latent, rope_key = self.attention(f"{p}.self_attn", x, positions)
        out[f"layer.{layer}.latent"], out[f"layer.{layer}.rope_key"] = latent, rope_key
        h = h + attended
        x = self.norm(f"{p}.post_attention_layernorm", h)
        if not self.is_moe(layer):
            return h + self.mlp(f"{p}.mlp", x)
        added, ids, weights = self.moe(f"{p}.mlp", x)
        out[f"layer.{layer}.topk_ids"], out[f"layer.{layer}.topk_weights"] = ids, weights
        return h + added

    def head(self, x):
        tied = self.config.get("tie_word_embeddings")
        return x @ self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def forward(self, tokens):
        """Everything about a sequence: logits, and by layer the cache entries and the gate's choices."""
        out = {}
        positions = torch.arange(len(tokens))
        h = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            h = self.layer(layer, h, positions, out)
        out["states"] = self.norm("model.norm", h)
        out["logits"] = self.head(out["states"])
        return out

    def mtp(self, tokens, states):
        """The MTP layer over positions 0..T-2, each with the token after it: its cache entries and draft logits."""
        layer, out = self.config["num_hidden_layers"], {}
        p = f"model.layers.{layer}"
        embedded = self.weights["model.embed_tokens.weight"][tokens[1:]]
        joined = [self.norm(f"{p}.enorm", embedded), self.norm(f"{p}.hnorm", states[:-1])]
        h = self.linear(f"{p}.eh_proj", torch.cat(joined, -1), quantise=False)
        h = self.layer(layer, h, torch.arange(len(h)), out)
        out["mtp_logits"] = self.head(self.norm(f"{p}.shared_head.norm", h))
        return out

    def generate(self, tokens, count):
        """Greedy tokens, recomputing everything each time."""
        tokens, new = list(tokens), []
        for _ in range(count):
            new.append(int(self.forward(torch.tensor(tokens))["logits"][-1].argmax()))
            tokens.append(new[-1])
        return new
