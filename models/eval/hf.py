"""The demo checkpoint in Hugging Face transformers on a CPU, its FP8 blocks widened on load."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

BLOCK = 128


def read_state(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor but the MTP layer's (transformers has none); FP8 blocks times their scales; biases stay float32."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    shards = {file: safe_open(folder / file, "pt") for file in set(index.values())}
    state = {}
    for name, file in index.items():
        if name.endswith("_scale_inv") or name.startswith(f"model.layers.{layers}."):
            continue
        tensor = shards[file].get_tensor(name)
        if tensor.dtype == torch.float8_e4m3fn:
            scale = shards[index[name + "_scale_inv"]].get_tensor(name + "_scale_inv")
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            tensor = tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]
        state[name] = tensor if "e_score_correction_bias" in name else tensor.to(dtype)
    return state


def load_hf(folder: Path, dtype: torch.dtype):
    """`DeepseekV3ForCausalLM` with the checkpoint's widened weights."""
    import tempfile

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    # transformers fuses the experts while it loads, so it is given a plain checkpoint of the widened weights.
    with tempfile.TemporaryDirectory() as plain:
        save_file(read_state(folder, dtype), Path(plain) / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (Path(plain) / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
    return model.eval()
