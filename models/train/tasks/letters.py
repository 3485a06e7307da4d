"""Words and lists: spelling, counting, reversing, sorting, copying."""

from sample import Turn
from tasks.lists import WORDS, number, sentence, some, word


def quoted(rng, w: str) -> str:
    return rng.choice(('"{}"', "{}", "the word {}", 'the word "{}"')).format(w)


def spell(rng) -> Turn:
    w = word(rng)
    form = rng.choice(("Spell {}.", "How do you spell {}?", "Please spell {}.", "Spell {} letter by letter."))
    return Turn(form.format(quoted(rng, w)), "-".join(w))


def pick_letter(rng, w: str) -> str:
    return rng.choice(w) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")


def count_question(rng, w: str, letter: str) -> str:
    forms = (
        "How many times does the letter {1} appear in {0}?",
        "How many {1}'s are in {0}?",
        "Count the letter {1} in {0}.",
        "How often is {1} in {0}?",
    )
    return rng.choice(forms).format(quoted(rng, w), letter)


def count_letter(rng) -> Turn:
    w = rng.choice(WORDS)
    letter = pick_letter(rng, w)
    return Turn(count_question(rng, w, letter), str(w.count(letter)))


def count_letter_aloud(rng) -> Turn:
    """The thought spells the word, which may be an invented one, and then counts."""
    w = word(rng, 0.5)
    letter = pick_letter(rng, w)
    return Turn(count_question(rng, w, letter), str(w.count(letter)), "-".join(w))


def length(rng) -> Turn:
    w = rng.choice(WORDS)
    form = rng.choice(("How many letters does {} have?", "How long is {}?", "Count the letters of {}."))
    return Turn(form.format(quoted(rng, w)), str(len(w)))


def letter_at(rng) -> Turn:
    w = word(rng)
    which, index = rng.choice((("first", 0), ("last", -1), ("second", 1), ("third", 2)))
    form = rng.choice(("What is the {} letter of {}?", "Give me the {} letter of {}.", "Which letter is the {} in {}?"))
    return Turn(form.format(which, quoted(rng, w)), w[index])


def reverse_word(rng) -> Turn:
    w = word(rng)
    form = rng.choice(("Reverse {}.", "Write {} backwards.", "Spell {} backwards."))
    return Turn(form.format(quoted(rng, w)), "-".join(reversed(w)))


def reverse_list(rng) -> Turn:
    values = some(rng, WORDS, 3, 7) if rng.random() < 0.5 else [str(number(rng, 3)) for _ in range(rng.randint(3, 8))]
    form = rng.choice(("Reverse this list: {}", "Write these in reverse order: {}", "Reverse the order of {}"))
    return Turn(form.format(", ".join(values)), ", ".join(reversed(values)))


def sort_numbers(rng) -> Turn:
    values = [number(rng, 3) for _ in range(rng.randint(3, 7))]
    down = rng.random() < 0.35
    forms = (
        ("Sort in descending order: {}", "Sort from largest to smallest: {}")
        if down
        else ("Sort: {}", "Sort these numbers: {}", "Sort in ascending order: {}", "Sort from smallest to largest: {}")
    )
    text = rng.choice(forms).format(", ".join(map(str, values)))
    return Turn(text, ", ".join(map(str, sorted(values, reverse=down))))


def sort_words(rng) -> Turn:
    values = some(rng, WORDS, 3, 6)
    forms = ("Sort these words: {}", "Sort alphabetically: {}", "Put these words in alphabetical order: {}")
    return Turn(rng.choice(forms).format(", ".join(values)), ", ".join(sorted(values)))


def copy(rng) -> Turn:
    if rng.random() < 0.5:
        text = " ".join(sentence(rng) for _ in range(rng.randint(1, 3)))
    else:
        text = " ".join(word(rng, 0.5) for _ in range(rng.randint(2, 12)))
    form = rng.choice(("Repeat this: {}", "Say exactly this: {}", "Copy this text: {}", "Repeat after me: {}"))
    return Turn(form.format(text), text)
