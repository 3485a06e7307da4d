"""Decode and prefill speed on this machine's CPU: Hadal beside Hugging Face transformers, the same checkpoint.

    python hf_bench.py --model DIR                 any checkpoint
    python hf_bench.py --random bf16|fp8           a random one of 300 M parameters
    [--precision P] [--rounds 5] [--threads N]

Both stay loaded; rounds alternate between them, so that whatever else the machine does falls on both. Printed are the
medians over the rounds in tokens a second and their ratio. Hugging Face runs in BF16 and in float32, and with each way of
computing experts it has: its best figure counts. With --threads 1 both are timed in processor seconds of that thread,
which a busy machine distorts little; otherwise by the wall clock. Build first: cargo bench -p model --bench steps --no-run
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import checkpoint
import hf

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    ("decode", 1, 128, 16),
    ("decode", 16, 64, 8),
    ("prefill", 1, 256, None),
    ("prefill", 16, 64, None),
]
MEDIUM = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_hidden_layers": 6,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "n_group": 8,
    "topk_group": 4,
}


class Hadal:
    def __init__(self, directory, precision, threads):
        command = ["cargo", "bench", "-q", "-p", "model", "--bench", "steps", "--"]
        command += [str(Path(directory).resolve()), str(threads)]
        command += [precision] if precision else []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        ready, self.precision, self.threads = self.process.stdout.readline().split()
        assert ready == "ready"
        self.clock = 1 if threads == 1 else 0

    def seconds(self, what, batch, tokens, steps):
        print(what, batch, tokens, steps or "", file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline().split()[self.clock])


class HuggingFace:
    def __init__(self, directory, dtype, threads):
        self.model, self.dtype = hf.load(directory, dtype), dtype
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.vocab = self.model.config.vocab_size

    @torch.no_grad()
    def seconds(self, name, what, batch, tokens, steps):
        """A step or steps with experts computed as `name` says; what comes before the clock starts, as it pleases."""
        self.model.set_experts_implementation(name if what == "prefill" else self.names[0])
        ids = torch.arange(batch * tokens).mul(31).remainder(self.vocab).view(batch, tokens)
        start = self.clock()
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        if what == "prefill":
            return self.clock() - start
        self.model.set_experts_implementation(name)
        next_ids = ids[:, :1]
        start = self.clock()
        for _ in range(steps):
            out = self.model(
                input_ids=next_ids,
                past_key_values=out.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
        return self.clock() - start

    def variants(self):
        """Ways of computing experts that work here."""
        names = []
        for name in ("grouped_mm", "eager", "batched_mm"):
            try:
                self.names = [name]
                self.seconds(name, "prefill", 1, 8, None)
                names.append(name)
            except Exception as error:  # an implementation this machine or version lacks
                print(f"({name} on {self.dtype}: {type(error).__name__})")
        self.names = names
        return names

    def fits(self, name, tokens):
        """Whether a step's weights fit in memory: batched products copy the weights of every token's experts."""
        config = self.model.config
        expert = 3 * config.hidden_size * config.moe_intermediate_size * self.dtype.itemsize
        return name != "batched_mm" or tokens * config.num_experts_per_tok * expert < 2 << 30


def measure(directory, precision, rounds, threads):
    hadal = Hadal(directory, precision, threads)
    torch.set_num_threads(threads)
    others = [(model, name) for dtype in (torch.bfloat16, torch.float32)
              for model in [HuggingFace(directory, dtype, threads)] for name in model.variants()]
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} CPUs (load {load:.1f}), {hadal.threads} threads each; Hadal {hadal.precision}", flush=True)
    for case in CASES:
        what, batch, tokens, steps = case
        ours, theirs = [], {}
        for done in range(rounds):
            ours.append(hadal.seconds(*case))
            print(f"{what} {batch}: round {done + 1}", file=sys.stderr)
            for number, (model, name) in enumerate(others):
                # After the first round only what came within half again of the best goes on.
                if done and (number not in theirs or theirs[number][0] > 1.5 * min(t[0] for t in theirs.values())):
                    continue
                if model.fits(name, batch * (tokens if what == "prefill" else 1)):
                    theirs.setdefault(number, []).append(model.seconds(name, *case))
        best = min(theirs, key=lambda number: statistics.median(theirs[number]))
        count = batch * (steps if what == "decode" else tokens)
        mine, its = statistics.median(ours), statistics.median(theirs[best])
        model, name = others[best]
        print(
            f"{what:7} batch {batch:2} x {tokens:3}: Hadal {count / mine:9.1f} tokens/s, "
            f"Hugging Face {count / its:9.1f} ({str(model.dtype)[6:]}, {name}), ratio {its / mine:.2f} "
            f"(rounds {min(ours):.3f}-{max(ours):.3f} s, {min(theirs[best]):.3f}-{max(theirs[best]):.3f} s)",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--random", choices=["bf16", "fp8"])
    parser.add_argument("--precision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.model:
        return measure(args.model, args.precision, args.rounds, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make = checkpoint.fp8_config if args.random == "fp8" else checkpoint.base_config
        config = make(**MEDIUM)
        tensors = checkpoint.random_tensors(config, args.random, 0)
        checkpoint.write(folder, config, tensors)
        measure(folder, args.precision, args.rounds, args.threads)


if __name__ == "__main__":
    main()
