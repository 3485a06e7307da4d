"""Hugging Face's `DeepseekV3ForCausalLM` over any released-format checkpoint, on the CPU.

FP8 checkpoints are dequantised first (transformers computes FP8 on GPUs only). Differences known and their treatment:
transformers up to 4.5x masks dropped groups with 0.0 instead of -inf: this script refuses such a version;
it regroups rotated keys, so keys are put back into pairs before they are compared.
"""

import inspect
import json
import tempfile

import torch
import transformers
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import checkpoint
from float64 import quantise_activations


def load(directory, dtype, activations=None):
    """The model with weights in `dtype`.

    With `activations` ("f32" or "ue8m0") the inputs of every FP8 weight but kv_b_proj are quantised as W8A8 does.
    """
    source = inspect.getsource(modeling_deepseek_v3)
    if 'float("-inf")' not in source:
        raise SystemExit("this transformers masks dropped expert groups with 0.0; use version 5 or later")
    config, tensors = checkpoint.read(directory)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config.pop("quantization_config", None)
    config.pop("num_nextn_predict_layers", None)
    trunk = f"model.layers.{config['num_hidden_layers']}."
    plain = checkpoint.dequantised(tensors, dtype)
    plain = {name: t.contiguous() for name, t in plain.items() if not name.startswith(trunk)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(folder, config, plain)
        # The plain loop over experts: the grouped one refuses odd sizes.
        model = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation="eager"
        )
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    if activations:
        quantise_inputs(model, fp8, activations)
    return model.eval()


def quantise_inputs(model, fp8, scale_format):
    """Puts the quantiser of float64.py before the products it stands before there."""

    def quantised(x):
        return quantise_activations(x, scale_format).to(x.dtype)

    def experts_forward(experts):
        def forward(x, ids, weights):
            out, x = torch.zeros_like(x), quantised(x)
            for expert in ids.unique().tolist():
                token, k = (ids == expert).nonzero(as_tuple=True)
                gate, up = (x[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
                inner = quantised(experts.act_fn(gate) * up) @ experts.down_proj[expert].T
                out.index_add_(0, token, (inner * weights[token, k, None]).to(out.dtype))
            return out

        return forward

    for name, module in model.named_modules():
        if f"{name}.weight" in fp8 and not name.endswith("kv_b_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (quantised(inputs[0]),))
        elif f"{name}.0.gate_proj.weight" in fp8:
            module.forward = experts_forward(module)


@torch.no_grad()
def forward(model, tokens):
    """Logits, and by layer the gate's choices and the cache entries (rope keys in interleaved order)."""
    out, hooks = {}, []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def keep(_, __, result, number=number):
                out[f"layer.{number}.topk_ids"] = result[2]
                out[f"layer.{number}.topk_weights"] = result[1]

            hooks.append(layer.mlp.gate.register_forward_hook(keep))
    result = model(input_ids=torch.as_tensor([list(tokens)]), use_cache=True)
    for hook in hooks:
        hook.remove()
    out["logits"] = result.logits[0]
    for number, layer in enumerate(result.past_key_values.layers):
        latent, rope = layer.keys[0, 0], layer.values[0, 0]
        out[f"layer.{number}.latent"] = latent
        half = rope.shape[-1] // 2
        out[f"layer.{number}.rope_key"] = torch.stack([rope[:, :half], rope[:, half:]], -1).flatten(1)
    return out


@torch.no_grad()
def generate(model, tokens, count):
    """Greedy tokens through the cache; end-of-text is a token like others."""
    result = model(input_ids=torch.as_tensor([list(tokens)]), use_cache=True)
    new = []
    while True:
        new.append(int(result.logits[0, -1].argmax()))
        if len(new) == count:
            return new
        result = model(
            input_ids=torch.tensor([[new[-1]]]),
            past_key_values=result.past_key_values,
            use_cache=True,
        )


def read_config(directory):
    with open(f"{directory}/config.json") as file:
        return json.load(file)
