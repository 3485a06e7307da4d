"""Codes hidden in a long text of random sentences, asked for afterwards."""

from sample import Sample, Turn
from tasks.lists import ADJECTIVES, NOUNS, sentence

# Roughly how many tokens one random sentence becomes.
SENTENCE_TOKENS = 13


def haystack(rng, sentences: int, codes: int) -> tuple[str, list[tuple[str, str]]]:
    """-> (text, [(thing, code)]). Things differ, but may share one of their two words."""
    things = set()
    while len(things) < codes:
        things.add(f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}")
    needles = [(thing, str(rng.randrange(10000, 100000))) for thing in sorted(things)]
    rng.shuffle(needles)
    lines = [sentence(rng) for _ in range(sentences)]
    for thing, code in needles:
        lines.insert(rng.randint(0, len(lines)), f"The code of the {thing} is {code}.")
    return " ".join(lines), needles


def question(rng, thing: str) -> str:
    return rng.choice(("What is the code of the {}?", "Find the code of the {}.", "Which code does the {} have?")).format(thing)


def find(rng, tokens: int, codes: int, questions: int) -> Sample:
    """One text of about `tokens` tokens and several questions about it, in as many turns."""
    text, needles = haystack(rng, max(1, (tokens - 15 * codes) // SENTENCE_TOKENS), codes)
    turns = [Turn(question(rng, thing), code) for thing, code in rng.sample(needles, questions)]
    system = ""
    place = rng.random()
    if place < 0.25:
        system = text
    elif place < 0.6:
        turns[0].user = f"{text}\n\n{turns[0].user}"
    else:
        turns[0].user = f"{turns[0].user}\n\n{text}"
    return Sample("needle", turns, system)


def needle(rng) -> Sample:
    """Short enough to pack with other conversations."""
    codes = rng.randint(1, 6)
    return find(rng, rng.randint(60, 700), codes, rng.randint(1, codes))


def long_needle(rng, longest: int) -> Sample:
    """A text of up to `longest` tokens with many questions, so that one long row teaches much."""
    codes = rng.randint(6, 16)
    tokens = rng.randint(longest // 4, longest) if rng.random() < 0.5 else rng.randint(longest * 3 // 4, longest)
    return find(rng, tokens - 60 * codes, codes, codes)
