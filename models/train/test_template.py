"""Holds `sample.segments` to `chat_template.jinja`: `python -m unittest` in this folder (needs jinja2)."""

import json
import random
import unittest
from pathlib import Path

from jinja2 import Environment

import sample as text
from tasks import mix

HERE = Path(__file__).parent


class Template(unittest.TestCase):
    def setUp(self):
        environment = Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self.template = environment.from_string((HERE / "chat_template.jinja").read_text())

    def render(self, **values) -> str:
        return self.template.render(bos_token=text.BOS, **values)

    def test_the_checkpoint_carries_this_template(self):
        config = json.loads((HERE / "../demo/tokenizer_config.json").read_text())
        self.assertEqual(config["chat_template"], (HERE / "chat_template.jinja").read_text())

    def test_training_text_is_what_the_template_renders(self):
        for kind in mix.KINDS:
            for seed in range(30):
                drawn = mix.draw(random.Random(seed), False, kind)
                pieces, talk = text.segments(drawn), text.messages(drawn)
                steps = 1 + bool(drawn.turns[-1].outputs)
                # Up to each of the last turn's answers.
                for back in range(1, steps + 1):
                    asked = talk[:-1] if back == 1 else talk[: -2 - len(drawn.turns[-1].outputs)]
                    after_tool = steps == 2 and back == 1
                    wanted = "".join(piece for piece, _ in pieces[: len(pieces) - 2 * back + 1])
                    if after_tool:
                        # An earlier thought is not shown again.
                        wanted = wanted.replace(text.THINK + drawn.turns[-1].thought + text.THOUGHT, text.THOUGHT)
                    got = self.render(messages=asked, tools=drawn.tools, thinking=drawn.thinking, add_generation_prompt=True)
                    self.assertEqual(got, wanted, kind)


if __name__ == "__main__":
    unittest.main()
