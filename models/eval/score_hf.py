"""Scores the checkpoint in Hugging Face transformers (CPU, FP8 blocks widened on load) on the held-out prompts.

    python score_hf.py [--model ../demo] [--dtype bfloat16] [--limit 100] [--results FILE]

Each answer is appended to the results file as soon as its batch is done; a run that was stopped goes on from there.

transformers before 5.20 wrote 0.0 over dropped expert groups; the checkpoint's gate biases are all positive, so that
no selected score can lie below that and the choice is the same.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import grading
from hf import load_hf
from prompter import Prompter

HERE = Path(__file__).parent


@torch.inference_mode()
def generate(model, prompts: list[list[int]], limit: int, end: int) -> list[list[int]]:
    """Greedy continuation of each prompt, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, temperature=None, top_p=None, eos_token_id=end, pad_token_id=end
    )
    return out[:, width:].tolist()


def read_results(file: Path | None) -> dict[int, bool]:
    """Prompt's id -> right or not, of an earlier run that was stopped."""
    if not file or not file.exists():
        return {}
    return {line["id"]: line["right"] for line in map(json.loads, file.read_text().splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE.parent / "demo")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--limit", type=int, help="about this many prompts, spread over all kinds")
    parser.add_argument("--batch-tokens", type=int, default=12000)
    parser.add_argument("--max-tokens", type=int, default=500)
    parser.add_argument("--skip", nargs="*", default=[], help="kinds to leave out")
    parser.add_argument("--show-wrong", action="store_true")
    parser.add_argument("--results", type=Path, help="JSON lines: answers already there are kept, new ones appended")
    args = parser.parse_args()
    prompter = Prompter(args.model)
    model = load_hf(args.model, getattr(torch, args.dtype))
    prompts = [p for p in grading.read_prompts(args.prompts, args.limit) if p["kind"] not in args.skip]
    done = read_results(args.results)
    results = [(p, done[p["id"]]) for p in prompts if p["id"] in done]
    prompts = [p for p in prompts if p["id"] not in done]
    encoded = [prompter.ids(prompt) for prompt in prompts]
    # Answers, then prompts, of about one length together, so that little is padding.
    expected = [len(json.dumps(p.get("calls", p.get("content")))) // 40 + p["thinking"] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (expected[i], len(encoded[i])))
    at, start = 0, time.time()
    while at < len(order):
        size = max(1, min(64, args.batch_tokens // max(len(encoded[i]) for i in order[at : at + 64])))
        batch = order[at : at + size]
        at += size
        for i, ids in zip(batch, generate(model, [encoded[i] for i in batch], args.max_tokens, 1)):
            ids = ids[: ids.index(1)] if 1 in ids else ids
            text = prompter.tokenizer.decode(ids, skip_special_tokens=False)
            right = grading.is_right(prompts[i], *grading.split(text, prompts[i]["thinking"]))
            results.append((prompts[i], right))
            answer = {"id": prompts[i]["id"], "kind": prompts[i]["kind"], "right": right, "got": text}
            line = json.dumps(answer, ensure_ascii=False)
            if args.results:
                with args.results.open("a") as file:
                    file.write(line + "\n")
            if args.show_wrong and not right:
                print(line, flush=True)
        print(f"{sum(right for _, right in results)} / {len(results)} after {time.time() - start:.0f} s", flush=True)
    print(grading.table(results))
    print(f"transformers, {args.dtype}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
