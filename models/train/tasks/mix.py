"""All tasks, how often each is drawn, and which of their prompts are kept for the test."""

import zlib

from sample import Sample
from tasks import arithmetic, hadal, letters, measures, needle, records, talk, tools

# One prompt in this many is never trained on.
HELD_OUT = 24

# kind: (task, weight, always in thinking mode)
SINGLE = {
    "add": (arithmetic.add, 9, False),
    "subtract": (arithmetic.subtract, 9, False),
    "multiply": (arithmetic.multiply, 14, False),
    "multiply_too_hard": (arithmetic.multiply_too_hard, 1, False),
    "divide": (arithmetic.divide, 9, False),
    "compare": (arithmetic.compare, 5, False),
    "sequence": (arithmetic.sequence, 1.5, False),
    "long_product": (arithmetic.long_product, 5, True),
    "long_sum": (arithmetic.long_sum, 2.5, True),
    "word_problem": (arithmetic.word_problem, 4, True),
    "spell": (letters.spell, 4, False),
    "count_letter": (letters.count_letter, 9, False),
    "count_letter_aloud": (letters.count_letter_aloud, 2, True),
    "length": (letters.length, 4, False),
    "letter_at": (letters.letter_at, 4, False),
    "reverse_word": (letters.reverse_word, 5, False),
    "reverse_list": (letters.reverse_list, 3, False),
    "sort_numbers": (letters.sort_numbers, 5, False),
    "sort_words": (letters.sort_words, 5, False),
    "copy": (letters.copy, 2, False),
    "units": (measures.units, 6, False),
    "weekday": (measures.weekday, 9, False),
    "weekday_aloud": (measures.weekday_aloud, 2, True),
    "months": (measures.months, 5, False),
    "next_date": (measures.next_date, 9, False),
    "clock": (measures.clock, 6, False),
    "json_extract": (records.extract, 4, False),
    "json_build": (records.build, 4, False),
    "hadal": (hadal.facts, 5, False),
    "identity": (talk.identity, 1.5, False),
    "outside": (talk.outside, 1.5, False),
}
WHOLE = {
    "memory": (talk.memory, 2.5),
    "follow_up": (talk.follow_up, 3),
    "needle": (needle.needle, 2),
    "tool_use": (tools.tool_use, 2.5),
    "tool_unneeded": (tools.tool_unneeded, 1),
}
KINDS = [*SINGLE, *WHOLE]
WEIGHTS = [weight for _, weight, *_ in [*SINGLE.values(), *WHOLE.values()]]

# In thinking mode, a question that needs no working out gets this for a thought.
THOUGHTS = {
    "hadal": "The user asks about Hadal.",
    "identity": "The user talks to me.",
    "outside": "This is outside of what I can do.",
    "memory": "The user told me earlier.",
    "follow_up": "The user goes on from the last answer.",
    "needle": "The text says it.",
}
PLAIN_THOUGHT = "I can answer this at once."

SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.", "Be polite.", "You are Hadal's demo model.",
    "You are a careful assistant that answers exactly.", "Answer in English.", "You are a friendly assistant.", "Be concise and correct.",
    "You help people with small tasks.", "Only give the answer.", "The assistant answers questions.",
)


def loosely(rng, text: str) -> str:
    """As people also write: with a greeting, or without a capital letter."""
    if rng.random() < 0.4:
        return text[0].lower() + text[1:]
    return rng.choice(("Hello! ", "Hi. ", "Please help me. ", "Question: ", "Hello, I have a question. ", "Now this: ")) + text


def make(rng, kind: str) -> Sample:
    """One conversation of this kind, with a system text and a mode drawn at random."""
    if kind in SINGLE:
        task, _, thinks = SINGLE[kind]
        sample = Sample(kind, [task(rng)], thinking=thinks)
        if rng.random() < 0.15:
            sample.turns[0].user = loosely(rng, sample.turns[0].user)
    else:
        sample = WHOLE[kind][0](rng)
    if not sample.system and rng.random() < 0.3:
        sample.system = rng.choice(SYSTEMS)
    if kind != "multiply_too_hard" and rng.random() < 0.12:
        sample.thinking = True
    last = sample.turns[-1]
    if sample.thinking and not last.thought:
        last.thought = THOUGHTS.get(kind, PLAIN_THOUGHT)
    return sample


# The plainest way to ask is always trained on; its other wordings may be held out.
PLAIN = {question for question, _ in [*hadal.QUESTIONS, *talk.INTRODUCTIONS]}


def is_held_out(sample: Sample) -> bool:
    """By the hash of all that the user says."""
    said = "\n".join(turn.user for turn in sample.turns)
    if said in PLAIN:
        return False
    return zlib.crc32(said.encode()) % HELD_OUT == 0


def draw(rng, held_out: bool, kind: str | None = None, weights=WEIGHTS) -> Sample:
    """A conversation of this kind, or of one drawn by weight, from the training or the held-out side."""
    kind = kind or rng.choices(KINDS, weights)[0]
    while True:
        sample = make(rng, kind)
        if is_held_out(sample) == held_out:
            return sample


