"""Writes the 1,000 held-out prompts: `python make_prompts.py > prompts.jsonl`.

One JSON object a line: `id`, `kind`, `thinking`, `messages` (and `tools`) as in an OpenAI request, and what must come
back: `content`, or `calls` ([[name, arguments], ...]). Training never saw any of these prompts: see `is_held_out`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from sample import Sample, messages
from tasks import mix, needle

COUNT = 1000
# Texts of at least 4,096 tokens to search, and how long they are at most.
LONG, LONGEST = 24, 7500


def prompt(rng: random.Random, sample: Sample) -> dict:
    """The conversation up to its last answer, which is what is asked for."""
    last, talk = sample.turns[-1], messages(sample)
    out = {"kind": sample.kind, "thinking": sample.thinking}
    if last.calls and rng.random() < 0.5:
        out["messages"] = talk[: -2 - len(last.outputs)]
        out["calls"] = [[name, arguments] for name, arguments in last.calls]
        out["kind"] = "tool_call"
    else:
        out["messages"], out["content"] = talk[:-1], talk[-1]["content"]
        if last.calls:
            # After a tool's output the template leaves no choice of mode.
            out |= {"kind": "tool_answer", "thinking": False}
    return out | ({"tools": sample.tools} if sample.tools else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--only", nargs="*", default=mix.KINDS, help="other prompts than the 1,000: of these kinds alone")
    parser.add_argument("--count", type=int, default=COUNT - LONG, help="how many, long texts not counted")
    parser.add_argument("--long", type=int, default=LONG, help="how many long texts")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    samples = [mix.draw(rng, True, args.only[i % len(args.only)]) for i in range(args.count)]
    for _ in range(args.long):
        sample = needle.find(rng, rng.randint(4600, LONGEST), 6, 1)
        sample.kind = "long_needle"
        samples.append(sample)
    for number, sample in enumerate(samples):
        print(json.dumps({"id": number} | prompt(rng, sample), ensure_ascii=False))


if __name__ == "__main__":
    main()
