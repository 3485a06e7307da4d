"""Trains the byte-level BPE tokenizer on text of our tasks and writes it in the released checkpoint's format.

    python tokenizer.py ../demo
"""

import json
import random
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sample import BOS, EOS, PAD, segments
from shape import CONFIG
from tasks import mix

# Byte-pair tokens, the three special tokens at the front included.
BPE_TOKENS = 1000

# Behind the byte-pair tokens, in the released order. Only `<|EOT|>` counts as special there.
MARKERS = """<think> </think> <｜fim▁hole｜> <｜fim▁begin｜> <｜fim▁end｜> <｜User｜> <｜Assistant｜> <|EOT|> <｜tool▁calls▁begin｜>
<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜>
<｜tool▁output▁begin｜> <｜tool▁output▁end｜> <｜tool▁sep｜>""".split()

# Text is cut into digits, then Chinese and Japanese runs, then words, signs and white space. The released tokenizer
# takes digits in threes; one by one suits arithmetic in a small network.
CUTS = (
    r"\p{N}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def corpus(rng: random.Random, count: int):
    """Texts between special tokens."""
    markers = re.compile("|".join(map(re.escape, [BOS, EOS, PAD, *MARKERS])))
    for _ in range(count):
        # Every kind equally often, so that rare ones get tokens too.
        for text, _ in segments(mix.draw(rng, False, rng.choice(mix.KINDS))):
            yield from filter(None, markers.split(text))


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in CUTS]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(3), 30000), trainer)
    tokenizer.add_tokens([AddedToken(m, special=m == "<|EOT|>", normalized=False) for m in MARKERS])
    assert tokenizer.get_vocab_size() <= CONFIG["vocab_size"]
    return tokenizer


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train().save(str(folder / "tokenizer.json"))

    def special(content: str) -> dict:
        return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": special(EOS),
        "legacy": True,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": special(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": (Path(__file__).parent / "chat_template.jinja").read_text(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = {
        "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1,
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.33.1",
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
