"""DeepSeek-V3 in PyTorch, for training: MLA in its expanded form, grouped sigmoid gate, YaRN, one MTP layer.

The arithmetic is that of `DeepseekV3ForCausalLM` in transformers; `check_hf.py` compares the two. Parameters are
float32 masters and are cast to the activations' type where they are used, so the same code runs in bfloat16 for
training and in float32 for checks.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6


def yarn_frequencies(cfg: dict) -> torch.Tensor:
    """Rotation per position of each of the `qk_rope_head_dim / 2` pairs."""
    dim, base, yarn = cfg["qk_rope_head_dim"], cfg["rope_theta"], cfg["rope_scaling"]

    def pair_of(rotations: float) -> float:
        length = yarn["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_of(yarn["beta_slow"])), dim - 1)
    theta = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return (theta * (1 - ramp) + theta / yarn["factor"] * ramp).float()


def softmax_scale(cfg: dict) -> float:
    """1 / sqrt(query width), times YaRN's squared magnitude."""
    yarn = cfg["rope_scaling"]
    m = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1.0
    return (cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]) ** -0.5 * m * m


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype))


def as_fp8(x: torch.Tensor) -> torch.Tensor:
    """x rounded as W8A8 rounds a matrix's input: E4M3, one scale for each 128 channels of a row. The gradient passes
    through unchanged, so that the network learns to live with the rounding."""
    groups = x.float().unflatten(-1, (-1, min(128, x.shape[-1])))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
    rounded = ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    return x + (rounded.to(x.dtype) - x).detach()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring pairs. x: [N, heads, rope]; cos, sin: [N, rope / 2]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def matrix(*shape: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


class Mlp(nn.Module):
    """`x` comes rounded already; `rounded` says how the inner values are rounded."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = matrix(inner, hidden, std=hidden**-0.5)
        self.up_proj = matrix(inner, hidden, std=hidden**-0.5)
        self.down_proj = matrix(hidden, inner, std=0.3 * inner**-0.5)

    def forward(self, x, rounded):
        return linear(rounded(F.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj)), self.down_proj)


class Dispatch(torch.autograd.Function):
    """x [N, D] -> one row for each (token, choice), in expert order. The backward pass needs no atomics."""

    @staticmethod
    def forward(ctx, x, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """Rows in expert order -> rows in token order."""

    @staticmethod
    def forward(ctx, y, order, inverse):
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


class Moe(nn.Module):
    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg = cfg
        hidden, inner, experts = cfg["hidden_size"], cfg["moe_intermediate_size"], cfg["n_routed_experts"]
        self.gate = matrix(experts, hidden, std=hidden**-0.5)
        self.register_buffer("bias", torch.zeros(experts))
        # Gate and up side by side: [E, hidden, 2 x inner]; down: [E, inner, hidden].
        self.gate_up = matrix(experts, hidden, 2 * inner, std=hidden**-0.5)
        self.down = matrix(experts, inner, hidden, std=0.2 * inner**-0.5)
        self.shared = Mlp(hidden, inner)

    def choose(self, x):
        """-> (experts [N, K], weights [N, K]); the bias takes part in the choice only."""
        cfg = self.cfg
        scores = F.linear(x.float(), self.gate).sigmoid()
        choice = (scores.detach() + self.bias).unflatten(-1, (cfg["n_group"], -1))
        group_score = choice.topk(2, -1).values.sum(-1)
        kept = group_score.topk(cfg["topk_group"], -1).indices
        dropped = torch.ones_like(group_score).scatter_(-1, kept, 0.0).bool()
        choice = choice.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        experts = choice.topk(cfg["num_experts_per_tok"], -1).indices
        weights = scores.gather(-1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * cfg["routed_scaling_factor"]
        return experts, weights

    def forward(self, x, rounded):
        k, count = self.cfg["num_experts_per_tok"], self.cfg["n_routed_experts"]
        experts, weights = self.choose(x)
        flat = experts.flatten()
        order = flat.to(torch.uint8).sort(stable=True).indices
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        load = (flat[:, None] == torch.arange(count, device=x.device)).sum(0)
        ends = load.cumsum(0).to(torch.int32)
        x = rounded(x)
        rows = Dispatch.apply(x, order, inverse, k)
        gate, up = torch._grouped_mm(rows, self.gate_up.to(x.dtype), offs=ends).chunk(2, -1)
        rows = torch._grouped_mm(rounded(F.silu(gate) * up), self.down.to(x.dtype), offs=ends)
        rows = Collect.apply(rows, order, inverse).unflatten(0, (-1, k))
        routed = (rows.float() * weights[..., None]).sum(1).to(x.dtype)
        return routed + self.shared(x, rounded), load


class Attention(nn.Module):
    def __init__(self, cfg: dict):
        super().__init__()
        self.cfg = cfg
        hidden, heads = cfg["hidden_size"], cfg["num_attention_heads"]
        nope, rope, value = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"], cfg["v_head_dim"]
        q_rank, kv_rank = cfg["q_lora_rank"], cfg["kv_lora_rank"]
        self.q_a_proj = matrix(q_rank, hidden, std=hidden**-0.5)
        self.q_a_layernorm = Norm(q_rank)
        self.q_b_proj = matrix(heads * (nope + rope), q_rank, std=q_rank**-0.5)
        self.kv_a_proj_with_mqa = matrix(kv_rank + rope, hidden, std=hidden**-0.5)
        self.kv_a_layernorm = Norm(kv_rank)
        self.kv_b_proj = matrix(heads * (nope + value), kv_rank, std=kv_rank**-0.5)
        self.o_proj = matrix(hidden, heads * value, std=0.3 * hidden**-0.5)
        self.scale = softmax_scale(cfg)

    def forward(self, x, cos, sin, layout, rounded):
        cfg, heads = self.cfg, self.cfg["num_attention_heads"]
        nope, rope, value = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"], cfg["v_head_dim"]
        x = rounded(x)
        q = linear(rounded(self.q_a_layernorm(linear(x, self.q_a_proj))), self.q_b_proj).unflatten(-1, (heads, -1))
        q_nope, q_rope = q.split((nope, rope), -1)
        latent, k_rope = linear(x, self.kv_a_proj_with_mqa).split((cfg["kv_lora_rank"], rope), -1)
        kv = linear(self.kv_a_layernorm(latent), self.kv_b_proj).unflatten(-1, (heads, -1))
        k_nope, v = kv.split((nope, value), -1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, heads, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        # Flash attention wants one head width.
        v = F.pad(v, (0, nope + rope - value))
        out, start = [], 0
        for rows, length in layout:
            part = slice(start, start + rows * length)
            start += rows * length
            q_, k_, v_ = (t[part].view(rows, length, heads, -1).transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, scale=self.scale)
            out.append(o.transpose(1, 2)[..., :value].reshape(rows * length, heads * value))
        return linear(rounded(torch.cat(out)), self.o_proj)


class Layer(nn.Module):
    def __init__(self, cfg: dict, dense: bool):
        super().__init__()
        hidden = cfg["hidden_size"]
        self.input_layernorm = Norm(hidden)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = Norm(hidden)
        self.dense = dense
        self.mlp = Mlp(hidden, cfg["intermediate_size"]) if dense else Moe(cfg)

    def forward(self, x, cos, sin, layout, rounded):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, rounded)
        y = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(rounded(y), rounded), None
        y, load = self.mlp(y, rounded)
        return x + y, load


class Net(nn.Module):
    """tokens [N] (rows of `layout` one after another) -> hidden states, logits and expert loads."""

    def __init__(self, cfg: dict, dtype=torch.bfloat16, fp8_inputs: bool = False):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.rounded = as_fp8 if fp8_inputs else lambda x: x
        hidden, vocab = cfg["hidden_size"], cfg["vocab_size"]
        self.embed_tokens = matrix(vocab, hidden, std=0.5)
        dense = cfg["first_k_dense_replace"]
        self.layers = nn.ModuleList(Layer(cfg, i < dense) for i in range(cfg["num_hidden_layers"]))
        self.norm = Norm(hidden)
        self.lm_head = matrix(vocab, hidden, std=0.02)
        # The MTP layer; embedding and head are the main model's.
        self.enorm, self.hnorm, self.mtp_norm = Norm(hidden), Norm(hidden), Norm(hidden)
        self.eh_proj = matrix(hidden, 2 * hidden, std=(2 * hidden) ** -0.5)
        self.mtp = Layer(cfg, dense=False)
        self.register_buffer("frequencies", yarn_frequencies(cfg), persistent=False)

    def moes(self) -> list[Moe]:
        return [layer.mlp for layer in [*self.layers, self.mtp] if not layer.dense]

    def angles(self, layout):
        device = self.frequencies.device
        position = torch.cat([torch.arange(length, device=device).repeat(rows) for rows, length in layout])
        angle = position[:, None].float() * self.frequencies
        return angle.cos(), angle.sin()

    def states(self, tokens, following, layout):
        """`following[i]` is the token after `tokens[i]`, which the MTP layer reads.

        Returns what the head turns into logits for token i+1 and, from the MTP layer, for token i+2; and the loads
        [MoE layers, experts]."""
        cos, sin = self.angles(layout)
        x, loads = F.embedding(tokens, self.embed_tokens).to(self.dtype), []
        for layer in self.layers:
            x, load = layer(x, cos, sin, layout, self.rounded)
            if load is not None:
                loads.append(load)
        state = self.norm(x)
        ahead = F.embedding(following, self.embed_tokens).to(self.dtype)
        x = linear(torch.cat((self.enorm(ahead), self.hnorm(state)), -1), self.eh_proj)
        x, load = self.mtp(x, cos, sin, layout, self.rounded)
        loads.append(load)
        return state, self.mtp_norm(x), torch.stack(loads)

    def forward(self, tokens, following, layout):
        """-> (logits for i+1, MTP logits for i+2, loads)."""
        state, drafted, loads = self.states(tokens, following, layout)
        return linear(state, self.lm_head), linear(drafted, self.lm_head), loads
