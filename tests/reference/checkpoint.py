"""Small random checkpoints in the released format, and reading any such checkpoint back as float values."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

BLOCK = 128
FP8_MAX = 448.0


def base_config(**changes):
    """A small network with everything V3 has; `changes` replace fields, None removes one."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "intermediate_size": 96,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None or key == "q_lora_rank"}


def fp8_config(**changes):
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    if changes.pop("ue8m0", False):
        quantisation["scale_fmt"] = "ue8m0"
    return base_config(quantization_config=quantisation, **changes)


def shapes(config):
    """Name -> (shape, kind) of every tensor; kind is linear, plain, norm or bias."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    qk = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    latent = config["kv_lora_rank"]
    layers, mtp = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    found = {
        "model.embed_tokens.weight": ((config["vocab_size"], hidden), "plain"),
        "model.norm.weight": ((hidden,), "norm"),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = ((config["vocab_size"], hidden), "plain")

    def mlp(prefix, inter):
        found[f"{prefix}.gate_proj.weight"] = ((inter, hidden), "linear")
        found[f"{prefix}.up_proj.weight"] = ((inter, hidden), "linear")
        found[f"{prefix}.down_proj.weight"] = ((hidden, inter), "linear")

    for layer in range(layers + mtp):
        p = f"model.layers.{layer}"
        a = f"{p}.self_attn"
        found[f"{p}.input_layernorm.weight"] = ((hidden,), "norm")
        found[f"{p}.post_attention_layernorm.weight"] = ((hidden,), "norm")
        if (rank := config["q_lora_rank"]) is None:
            found[f"{a}.q_proj.weight"] = ((heads * qk, hidden), "linear")
        else:
            found[f"{a}.q_a_proj.weight"] = ((rank, hidden), "linear")
            found[f"{a}.q_a_layernorm.weight"] = ((rank,), "norm")
            found[f"{a}.q_b_proj.weight"] = ((heads * qk, rank), "linear")
        width = latent + config["qk_rope_head_dim"]
        found[f"{a}.kv_a_proj_with_mqa.weight"] = ((width, hidden), "linear")
        found[f"{a}.kv_a_layernorm.weight"] = ((latent,), "norm")
        out = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
        found[f"{a}.kv_b_proj.weight"] = ((out, latent), "linear")
        found[f"{a}.o_proj.weight"] = ((hidden, heads * config["v_head_dim"]), "linear")
        if layer < config["first_k_dense_replace"]:
            mlp(f"{p}.mlp", config["intermediate_size"])
        else:
            inter = config["moe_intermediate_size"]
            for expert in range(config["n_routed_experts"]):
                mlp(f"{p}.mlp.experts.{expert}", inter)
            mlp(f"{p}.mlp.shared_experts", inter * config["n_shared_experts"])
            found[f"{p}.mlp.gate.weight"] = ((config["n_routed_experts"], hidden), "plain")
            bias = f"{p}.mlp.gate.e_score_correction_bias"
            found[bias] = ((config["n_routed_experts"],), "bias")
        if layer >= layers:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                found[f"{p}.{norm}.weight"] = ((hidden,), "norm")
            found[f"{p}.eh_proj.weight"] = ((hidden, 2 * hidden), "plain")
    return found


def by_blocks(scales, shape):
    """Block scales repeated to the shape of their matrix."""
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def quantise_blocks(weight, ue8m0):
    """FP8 values and multiplicative scales of 128 x 128 blocks."""
    rows, cols = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, cols * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    amax = padded.abs().reshape(rows, BLOCK, cols, BLOCK).amax(dim=(1, 3))
    scales = amax.clamp(min=1e-12) / FP8_MAX
    if ue8m0:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    values = (weight / by_blocks(scales, weight.shape)).clamp(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scales


def random_tensors(config, dtype, seed):
    """Tensors of a network whose activations stay of order one, biases of both signs. `dtype`: f32, bf16 or fp8."""
    generator = torch.Generator().manual_seed(seed)
    ue8m0 = config.get("quantization_config", {}).get("scale_fmt") == "ue8m0"
    wide = torch.float32 if dtype == "f32" else torch.bfloat16
    tensors = {}
    for name, (shape, kind) in shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if kind == "norm":
            tensors[name] = (1 + 0.1 * values).to(wide)
        elif kind == "bias":
            tensors[name] = 0.15 * values - 0.05
        elif kind == "linear" and dtype == "fp8":
            weight, scales = quantise_blocks(values * shape[1] ** -0.5, ue8m0)
            tensors[name], tensors[f"{name}_scale_inv"] = weight, scales
        elif name == "model.embed_tokens.weight":
            tensors[name] = values.to(wide)
        else:
            tensors[name] = (values * shape[1] ** -0.5).to(wide)
    return tensors


def write(directory, config, tensors, shards=1):
    """Writes config.json and one file, or shards with an index."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    place = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        place.update(dict.fromkeys(part, file))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")


def read(directory):
    """Config, and every tensor as stored."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors = {}
    for name in names:
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():
                tensors[key] = file.get_tensor(key)
    return config, tensors


def dequantised(tensors, dtype):
    """Every weight in `dtype`, FP8 blocks multiplied with their scales; gate biases stay float32 or wider."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scales = by_blocks(tensors[f"{name}_scale_inv"].double(), tensor.shape)
            tensor = tensor.double() * scales
        keep = name.endswith("e_score_correction_bias") and dtype == torch.bfloat16
        out[name] = tensor.to(torch.float32 if keep else dtype)
    return out
