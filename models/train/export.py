"""Writes the network as a released-format checkpoint: FP8 128x128 blocks, tensor names, shards, index, config."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from net import Net
from shape import CONFIG

BLOCK = 128
SHARD_BYTES = 11 << 20


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (E4M3 [out, in], F32 scales [ceil(out/128), ceil(in/128)]); weight = value * scale, scale = largest/448."""
    out, inner = weight.shape
    rows, columns = -(-out // BLOCK), -(-inner // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32)
    padded[:out, :inner] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = (blocks.abs().amax((1, 3)) / 448.0).clamp(min=1e-12)
    value = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return value.view(rows * BLOCK, columns * BLOCK)[:out, :inner].contiguous(), scale


def dequantise(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return value.float() * wide[: value.shape[0], : value.shape[1]]


def layer_tensors(layer, prefix: str, put, put_fp8) -> None:
    attention = layer.self_attn
    put(prefix + "input_layernorm.weight", layer.input_layernorm.weight)
    put(prefix + "post_attention_layernorm.weight", layer.post_attention_layernorm.weight)
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        put_fp8(f"{prefix}self_attn.{name}.weight", getattr(attention, name))
    put(prefix + "self_attn.q_a_layernorm.weight", attention.q_a_layernorm.weight)
    put(prefix + "self_attn.kv_a_layernorm.weight", attention.kv_a_layernorm.weight)

    def mlp(at: str, gate, up, down) -> None:
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            put_fp8(f"{prefix}mlp.{at}{name}.weight", weight)

    if layer.dense:
        mlp("", layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        return
    moe = layer.mlp
    put(prefix + "mlp.gate.weight", moe.gate)
    # Adding one number to every bias changes no choice. With all of them positive, no selected score can fall below
    # the 0.0 that some implementations write over the groups they drop.
    bias = moe.bias - moe.bias.min() + 0.01
    put(prefix + "mlp.gate.e_score_correction_bias", bias, torch.float32)
    for e in range(moe.gate.shape[0]):
        gate, up = moe.gate_up[e].t().chunk(2, 0)
        mlp(f"experts.{e}.", gate, up, moe.down[e].t())
    shared = moe.shared
    mlp("shared_experts.", shared.gate_proj, shared.up_proj, shared.down_proj)


def tensors(net: Net) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, in the order of its layers."""
    out: dict[str, torch.Tensor] = {}

    def put(name, tensor, dtype=torch.bfloat16):
        out[name] = tensor.detach().float().cpu().to(dtype).contiguous().clone()

    def put_fp8(name, tensor):
        out[name], out[name + "_scale_inv"] = quantise(tensor.detach().float().cpu())

    put("model.embed_tokens.weight", net.embed_tokens)
    for index, layer in enumerate(net.layers):
        layer_tensors(layer, f"model.layers.{index}.", put, put_fp8)
    put("model.norm.weight", net.norm.weight)
    put("lm_head.weight", net.lm_head)
    prefix = f"model.layers.{len(net.layers)}."
    put(prefix + "embed_tokens.weight", net.embed_tokens)
    put(prefix + "enorm.weight", net.enorm.weight)
    put(prefix + "hnorm.weight", net.hnorm.weight)
    put(prefix + "eh_proj.weight", net.eh_proj)
    layer_tensors(net.mtp, prefix, put, put_fp8)
    put(prefix + "shared_head.norm.weight", net.mtp_norm.weight)
    put(prefix + "shared_head.head.weight", net.lm_head)
    return out


def write(net: Net, folder: Path) -> None:
    """Shards, index and config.json. Tokenizer files are written by `tokenizer.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors(net).items():
        # A tensor costs its bytes and about this much in the shard's header.
        cost = tensor.nbytes + 160
        if size + cost > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += cost
        total += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):06}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def load_rounded(net: Net, folder: Path) -> None:
    """Reads a checkpoint that `write` made back into `net`: what a server sees, FP8 rounding included."""
    from safetensors import safe_open

    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                stored[name] = shard.get_tensor(name)
    with torch.no_grad():
        for name, tensor in list(stored.items()):
            if tensor.dtype == torch.float8_e4m3fn:
                stored[name] = dequantise(tensor, stored[name + "_scale_inv"])
        read_into(net, stored)


def read_into(net: Net, stored: dict[str, torch.Tensor]) -> None:
    def layer(module, prefix):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(module, name).weight.copy_(stored[f"{prefix}{name}.weight"])
        attention = module.self_attn
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            getattr(attention, name).copy_(stored[f"{prefix}self_attn.{name}.weight"])
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            getattr(attention, name).weight.copy_(stored[f"{prefix}self_attn.{name}.weight"])
        at = prefix + "mlp."
        mlps = [(module.mlp, at)] if module.dense else [(module.mlp.shared, at + "shared_experts.")]
        for mlp, where in mlps:
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(mlp, name).copy_(stored[f"{where}{name}.weight"])
        if module.dense:
            return
        moe = module.mlp
        moe.gate.copy_(stored[at + "gate.weight"])
        moe.bias.copy_(stored[at + "gate.e_score_correction_bias"])
        for e in range(moe.gate.shape[0]):
            gate, up, down = (stored[f"{at}experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down"))
            moe.gate_up[e].copy_(torch.cat((gate, up)).t())
            moe.down[e].copy_(down.t())

    net.embed_tokens.copy_(stored["model.embed_tokens.weight"])
    for index, module in enumerate(net.layers):
        layer(module, f"model.layers.{index}.")
    net.norm.weight.copy_(stored["model.norm.weight"])
    net.lm_head.copy_(stored["lm_head.weight"])
    prefix = f"model.layers.{len(net.layers)}."
    net.enorm.weight.copy_(stored[prefix + "enorm.weight"])
    net.hnorm.weight.copy_(stored[prefix + "hnorm.weight"])
    net.eh_proj.copy_(stored[prefix + "eh_proj.weight"])
    layer(net.mtp, prefix)
    net.mtp_norm.weight.copy_(stored[prefix + "shared_head.norm.weight"])
