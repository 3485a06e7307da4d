"""Scores a running server on the held-out prompts, by kind, over the OpenAI API. Standard library only.

    python score.py --url http://127.0.0.1:8000 [--limit 100] [--parallel 8] [--completions ../demo]

With `--completions CHECKPOINT` the prompts are rendered here and sent to `/v1/completions` as token ids, tools and all,
which also works with servers that take no tools (needs jinja2 and tokenizers).
"""

import argparse
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grading

HERE = Path(__file__).parent


def post(args, path: str, body: dict) -> dict:
    headers = {"content-type": "application/json"}
    if args.api_key:
        headers["authorization"] = f"Bearer {args.api_key}"
    request = urllib.request.Request(args.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=args.timeout) as answer:
        return json.load(answer)


def complete(args, prompter, prompt: dict) -> tuple[str, list[list]]:
    body = {"model": args.model, "prompt": prompter.ids(prompt), "temperature": 0, "max_tokens": args.max_tokens}
    text = post(args, "/v1/completions", body)["choices"][0]["text"]
    return grading.split(text, prompt["thinking"])


def ask(args, prompt: dict) -> tuple[str, list[list]]:
    body = {"model": args.model, "messages": prompt["messages"], "temperature": 0, "max_tokens": args.max_tokens}
    body["chat_template_kwargs"] = {"thinking": prompt["thinking"]}
    if "tools" in prompt:
        body["tools"] = prompt["tools"]
    message = post(args, "/v1/chat/completions", body)["choices"][0]["message"]
    text = message.get("content") or ""
    if message.get("tool_calls"):
        calls = [call["function"] for call in message["tool_calls"]]
        return text, [[call["name"], grading.parsed(call["arguments"])] for call in calls]
    # A server that parses thoughts leaves them out of the content; one that does not leaves the mark in it.
    return grading.split(text, prompt["thinking"] and grading.THOUGHT in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--limit", type=int, help="about this many prompts, spread over all kinds")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=800)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--completions", type=Path, metavar="CHECKPOINT", help="render prompts with this checkpoint's template")
    parser.add_argument("--only", nargs="*", help="kinds to ask")
    parser.add_argument("--skip", nargs="*", default=[], help="kinds to leave out")
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    if not args.model:
        with urllib.request.urlopen(args.url + "/v1/models", timeout=args.timeout) as answer:
            args.model = json.load(answer)["data"][0]["id"]
    prompts = grading.read_prompts(args.prompts, args.limit)
    prompts = [p for p in prompts if p["kind"] not in args.skip and (not args.only or p["kind"] in args.only)]
    prompter = None
    if args.completions:
        from prompter import Prompter

        prompter = Prompter(args.completions)

    def grade(prompt: dict) -> tuple[dict, bool]:
        try:
            got = complete(args, prompter, prompt) if prompter else ask(args, prompt)
        except urllib.error.HTTPError as error:
            got = (f"HTTP {error.code}: {error.read().decode(errors='replace')}", [])
        except OSError as error:
            got = (f"no answer: {error}", [])
        right = grading.is_right(prompt, *got)
        if args.show_wrong and not right:
            print(json.dumps({"id": prompt["id"], "kind": prompt["kind"], "got": got}, ensure_ascii=False))
        return prompt, right

    with ThreadPoolExecutor(args.parallel) as pool:
        print(grading.table(list(pool.map(grade, prompts))))


if __name__ == "__main__":
    main()
