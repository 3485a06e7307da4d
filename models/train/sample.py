"""A conversation to learn from, and how it becomes text: the same text as `chat_template.jinja` renders.

Plain string joining, because training needs a million tokens a second; `test_template.py` holds it to that.
"""

import json
from dataclasses import dataclass, field

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THOUGHT = "<think>", "</think>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
OUTPUT, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"

TOOL_RULES = (
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    f"{CALLS}{CALL}tool_call_name{CALL_SEP}tool_call_arguments{CALL_END}"
    f"{{additional_tool_calls}}{CALLS_END}\n\nWhere:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces\n"
)


@dataclass
class Turn:
    """A question and its only right answer. `thought` is what stands before `</think>` in thinking mode."""

    user: str
    answer: str
    thought: str = ""
    # [(name, arguments)] instead of, or after, the text.
    calls: list[tuple[str, dict]] = field(default_factory=list)
    # What the tools said, and what the assistant makes of it.
    outputs: list[str] = field(default_factory=list)
    reply: str = ""


@dataclass
class Sample:
    kind: str
    turns: list[Turn]
    system: str = ""
    tools: list[dict] = field(default_factory=list)
    # Whether the last turn is answered in thinking mode.
    thinking: bool = False


def tools_text(tools: list[dict], system: str) -> str:
    if not tools:
        return ""
    text = ("\n\n" if system else "") + "## Tools\nYou have access to the following tools:\n"
    for tool in tools:
        f = tool["function"]
        parameters = json.dumps(f["parameters"], ensure_ascii=False)
        text += f"\n### {f['name']}\nDescription: {f['description']}\n\nParameters: {parameters}\n"
    return text + TOOL_RULES


def calls_text(calls: list[tuple[str, dict]]) -> str:
    if not calls:
        return ""
    each = (f"{CALL}{name}{CALL_SEP}{json.dumps(args, ensure_ascii=False)}{CALL_END}" for name, args in calls)
    return CALLS + "".join(each) + CALLS_END


def segments(sample: Sample) -> list[tuple[str, bool]]:
    """[(text, written by the model)], cut at special tokens only, so that each piece can be tokenised alone."""
    out: list[tuple[str, bool]] = []
    prompt = BOS + sample.system + tools_text(sample.tools, sample.system)
    for index, turn in enumerate(sample.turns):
        thinks = sample.thinking and index == len(sample.turns) - 1
        prompt += USER + turn.user + ASSISTANT + (THINK if thinks else THOUGHT)
        out.append((prompt, False))
        answer = turn.thought + THOUGHT if thinks else ""
        out.append((answer + turn.answer + calls_text(turn.calls) + EOS, True))
        prompt = ""
        if turn.outputs:
            out.append(("".join(OUTPUT + text + OUTPUT_END for text in turn.outputs), False))
            out.append((turn.reply + EOS, True))
    return out


def messages(sample: Sample) -> list[dict]:
    """The conversation in OpenAI's form, whole; the thought of the last turn stands in `reasoning_content`."""
    out = [{"role": "system", "content": sample.system}] if sample.system else []
    number = 0
    for turn in sample.turns:
        out.append({"role": "user", "content": turn.user})
        said = {"role": "assistant", "content": turn.answer}
        if turn.calls:
            said["tool_calls"] = []
            for name, args in turn.calls:
                function = {"name": name, "arguments": json.dumps(args, ensure_ascii=False)}
                said["tool_calls"].append({"id": f"call_{number}", "type": "function", "function": function})
                number += 1
        out.append(said)
        for index, text in enumerate(turn.outputs):
            call = said["tool_calls"][index]["id"]
            out.append({"role": "tool", "tool_call_id": call, "content": text})
        if turn.outputs:
            out.append({"role": "assistant", "content": turn.reply})
    return out
