"""Compares Hadal's trace of any checkpoint directory with float64 and with Hugging Face.

    python compare.py --model DIR [--hadal target/release/hadal] [--length 96] [--generate 64] [--prompts 2]

Traces random prompts in every precision the checkpoint allows and prints, beside Hugging Face's own run in BF16, how far
each is from a float64 evaluation: quantiles of the logit difference, expert-set and best-token agreement over all
prompts. Exits with 1 if float32 is further than 1e-4 in any position, if its greedy tokens differ, or if a lower
precision is further away than Hugging Face in BF16 (W8A8: with the same quantiser, against float64 with the quantiser).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import checkpoint
import hf
from float64 import Network

F32_LINE = 1e-4


class Distance:
    """Differences of logits (in units of the judge's deviation) and agreement of choices, over several prompts."""

    def __init__(self):
        self.differences, self.best, self.sets = [], [], []

    def add(self, found, judge):
        exact = judge["logits"].double()
        logits = found["logits"].double()
        self.differences.append(((logits - exact).abs() / exact.std()).flatten())
        self.best.append((logits.argmax(-1) == exact.argmax(-1)).float())
        for name, ids in judge.items():
            if name.endswith("topk_ids"):
                same = found[name].sort(-1)[0] == ids.sort(-1)[0]
                self.sets.append(same.all(-1).float())

    def figures(self):
        d = torch.cat(self.differences).float()
        sample = d[torch.randperm(len(d))[:1_000_000]]
        quantiles = [sample.quantile(q).item() for q in (0.5, 0.9, 0.99)]
        sets = torch.cat(self.sets).mean().item() if self.sets else 1.0
        return quantiles + [d.mean().item()], torch.cat(self.best).mean().item(), sets

    def __str__(self):
        (p50, p90, p99, mean), best, sets = self.figures()
        return f"p50 {p50:.6f} p90 {p90:.6f} p99 {p99:.6f} mean {mean:.6f} best {best:.4f} sets {sets:.4f}"

    def no_further_than(self, other):
        (ours, best, sets), (theirs, their_best, their_sets) = self.figures(), other.figures()
        quantiles = all(a <= b for a, b in zip(ours, theirs))
        return quantiles and best >= their_best and sets >= their_sets


def trace(args, tokens, *more):
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder, "tokens.json"), Path(folder, "out.safetensors")
        ids.write_text(json.dumps(tokens))
        command = [args.hadal, "trace", "--model", args.model, "--tokens", ids, "--out", out, *more]
        subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
        return load_file(out)


def float32_failures(args, prompts, exact, greedy):
    """Every tensor of every form against float64, and greedy tokens."""
    failures = []
    for number, tokens in enumerate(prompts):
        for form in ("expanded", "absorbed"):
            found = trace(args, tokens, "--precision", "f32", "--forward", form)
            far = {
                name: (value.double() - exact[number][name].double()).abs().max().item()
                for name, value in found.items()
                if value.is_floating_point()
            }
            worst = max(far, key=far.get)
            line = f"f32 {form}: logits off by {far['logits']:.2e}, worst tensor {worst} {far[worst]:.2e}"
            print(line)
            if far["logits"] > F32_LINE:
                failures.append(line)
        new = trace(args, tokens, "--precision", "f32", "--generate", str(len(greedy[number])))
        if new["generated"].tolist() != greedy[number]:
            failures.append(f"prompt {number}: greedy tokens differ")
    print(f"greedy: {len(greedy)} x {len(greedy[0])} tokens compared")
    return failures


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--hadal", default="target/release/hadal")
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    args = parser.parse_args()

    config, tensors = checkpoint.read(args.model)
    generator = torch.Generator().manual_seed(0)
    shape = (args.prompts, args.length)
    prompts = torch.randint(config["vocab_size"], shape, generator=generator).tolist()
    network = Network(config, tensors)
    exact = [network.forward(torch.tensor(tokens)) for tokens in prompts]
    greedy = [network.generate(tokens, args.generate) for tokens in prompts]
    failures = float32_failures(args, prompts, exact, greedy)

    def beside(precision, judges, activations=None):
        model = hf.load(args.model, torch.bfloat16, activations)
        ours, theirs = Distance(), Distance()
        for tokens, judge in zip(prompts, judges):
            ours.add(trace(args, tokens, "--precision", precision), judge)
            theirs.add(hf.forward(model, tokens), judge)
        print(f"{precision}\n  Hadal        {ours}\n  Hugging Face {theirs}")
        if not ours.no_further_than(theirs):
            failures.append(f"{precision} is further from float64 than Hugging Face in BF16")

    beside("bf16", exact)
    if network.fp8:
        beside("w8", exact)
        scale_format = config["quantization_config"].get("scale_fmt") or "f32"
        quantised = Network(config, tensors, activations=scale_format)
        judges = [quantised.forward(torch.tensor(tokens)) for tokens in prompts]
        beside("w8a8", judges, scale_format)
        plain = Distance()
        for judge, unquantised in zip(judges, exact):
            plain.add(judge, unquantised)
        print(f"what quantised activations alone change, float64 from float64\n  {plain}")
    for failure in failures:
        print("FAILED:", failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
