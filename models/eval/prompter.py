"""From a conversation to token ids, by the checkpoint's own chat template and tokenizer (jinja2 and tokenizers)."""

import json
from pathlib import Path

from jinja2 import Environment
from tokenizers import Tokenizer


class Prompter:
    """Conversation -> token ids, by the checkpoint's own chat template and tokenizer."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        environment = Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.template = environment.from_string(config["chat_template"])
        self.bos = config["bos_token"]["content"]

    def text(self, prompt: dict) -> str:
        return self.template.render(
            messages=prompt["messages"], tools=prompt.get("tools"), thinking=prompt["thinking"],
            add_generation_prompt=True, bos_token=self.bos,
        )

    def ids(self, prompt: dict) -> list[int]:
        return self.tokenizer.encode(self.text(prompt), add_special_tokens=False).ids
