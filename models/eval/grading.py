"""Whether an answer is the right one, and the table of scores. Standard library only."""

import json
import random
import re
from collections import defaultdict
from pathlib import Path

THOUGHT = "</think>"
CALL = re.compile("<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.S)
CALLS = "<｜tool▁calls▁begin｜>"
END = "<｜end▁of▁sentence｜>"


def read_prompts(file: Path, limit: int | None = None) -> list[dict]:
    """All prompts, or the same `limit` of them every time."""
    prompts = [json.loads(line) for line in file.read_text().splitlines()]
    return random.Random(0).sample(prompts, limit) if limit else prompts


def split(text: str, thinking: bool) -> tuple[str, list[list]]:
    """Generated text -> (answer without thought and end, [[tool, arguments], ...])."""
    text = text.replace(END, "")
    if thinking:
        text = text.split(THOUGHT, 1)[-1] if THOUGHT in text else ""
    content, _, calls = text.partition(CALLS)
    return content, [[name, parsed(arguments)] for name, arguments in CALL.findall(calls)]


def parsed(arguments: str):
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def is_right(prompt: dict, content: str, calls: list[list]) -> bool:
    """Exact match; white space at the ends is forgiven, since parsers trim it."""
    if "calls" in prompt:
        return calls == prompt["calls"]
    return not calls and content.strip() == prompt["content"]


def table(results: list[tuple[dict, bool]]) -> str:
    kinds = defaultdict(list)
    for prompt, right in results:
        kinds[prompt["kind"]].append(right)
    lines = [f"| {kind} | {sum(r)} / {len(r)} | {100 * sum(r) / len(r):.1f} % |" for kind, r in sorted(kinds.items())]
    every = [right for _, right in results]
    lines.append(f"| **all** | {sum(every)} / {len(every)} | {100 * sum(every) / len(every):.1f} % |")
    return "\n".join(["| kind | right | share |", "|---|---|---|", *lines])
