"""Writes fixtures/: small random checkpoints and what the judges say about them.

    python make_fixtures.py [NAME ...]

Each fixture is a released-format directory plus expected.safetensors:
  tokens [T]                          the prompt
  logits, layer.{l}.*                 float64 evaluation of every position (stored as float32)
  mtp_logits [T - 1, V]               float64 drafts for positions 2.. (where there is an MTP layer)
  generated [64]                      greedy continuation of the first 24 tokens, float64
  hf_bf16.logits, hf_bf16.layer.{l}.topk_ids   Hugging Face's BF16 run, as the yardstick of low precision
  w8a8.logits, w8a8.layer.{l}.topk_ids         float64 with quantised activations (FP8 checkpoints)
  hf_w8a8.logits, hf_w8a8.layer.{l}.topk_ids   Hugging Face's BF16 run with quantised activations: the yardstick of W8A8,
                                               since the quantiser makes a percent of noise out of a small rounding
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
import hf
from float64 import Network

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS, PROMPT, GENERATED = 130, 24, 64
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 56,
}


def configs():
    """Name -> (config, stored type, shards)."""
    plain = {
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    }
    wide = {"hidden_size": 160, "kv_lora_rank": 136, "q_lora_rank": 72, "intermediate_size": 136}
    return {
        "f32": (checkpoint.base_config(**SMALL | {"torch_dtype": "float32"}), "f32", 1),
        "bf16": (checkpoint.base_config(**SMALL | {"q_lora_rank": 20}), "bf16", 3),
        "bf16-plain": (checkpoint.base_config(**SMALL | plain), "bf16", 1),
        "fp8": (checkpoint.fp8_config(**SMALL | wide), "fp8", 2),
        "fp8-ue8m0": (
            checkpoint.fp8_config(
                ue8m0=True,
                **SMALL
                | {
                    "hidden_size": 144,
                    "num_hidden_layers": 2,
                    "num_nextn_predict_layers": 0,
                    "moe_intermediate_size": 136,
                },
            ),
            "fp8",
            1,
        ),
    }


@torch.no_grad()
def expected(directory, seed):
    config, tensors = checkpoint.read(directory)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config["vocab_size"], (TOKENS,), generator=generator)
    network = Network(config, tensors)
    out = network.forward(tokens)
    states = out.pop("states")
    if config["num_nextn_predict_layers"]:
        out |= network.mtp(tokens, states)
    out["tokens"] = tokens
    out["generated"] = torch.tensor(network.generate(tokens[:PROMPT].tolist(), GENERATED))

    def add(prefix, found):
        for name, value in found.items():
            if name == "logits" or name.endswith("topk_ids"):
                out[f"{prefix}.{name}"] = value

    add("hf_bf16", hf.forward(hf.load(directory, torch.bfloat16), tokens.tolist()))
    if network.fp8:
        scale_format = config["quantization_config"].get("scale_fmt", "f32")
        add("w8a8", Network(config, tensors, activations=scale_format).forward(tokens))
        model = hf.load(directory, torch.bfloat16, activations=scale_format)
        add("hf_w8a8", hf.forward(model, tokens.tolist()))
    narrow = {True: torch.float32, False: torch.int32}
    return {name: v.to(narrow[v.is_floating_point()]).contiguous() for name, v in out.items()}


def main():
    for seed, (name, (config, dtype, shards)) in enumerate(configs().items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        directory = FIXTURES / name
        checkpoint.write(directory, config, checkpoint.random_tensors(config, dtype, seed), shards)
        found = expected(directory, seed)
        save_file(found, directory / "expected.safetensors")
        size = sum(file.stat().st_size for file in directory.iterdir())
        print(f"{name}: {size / 1e6:.2f} MB, greedy {found['generated'][:8].tolist()} ...")


if __name__ == "__main__":
    main()
