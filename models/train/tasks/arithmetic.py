"""Numbers: answered at once, or worked out step by step in thinking mode."""

from sample import Turn
from tasks.lists import name, number, some

NEEDS_THOUGHT = "That is too hard for me without thinking. Turn thinking on and ask again."


def signed(sign: str) -> tuple[str, ...]:
    """Ways to ask with the sign itself."""
    plain = f"{{}} {sign} {{}}"
    asks = ("What is {}?", "{} =", "{} = ?", "{}", "Calculate {}.", "what is {}", "What's {}?", "How much is {}?", "Compute {}.")
    return (*(ask.format(plain) for ask in asks), f"{{}}{sign}{{}}", f"{{}}{sign}{{}}=", f"What is {{}}{sign}{{}}?")


def add(rng) -> Turn:
    a, b = number(rng, 4), number(rng, 4)
    forms = ("Add {} and {}.", "What is {} plus {}?", *signed("+"))
    return Turn(rng.choice(forms).format(a, b), str(a + b))


def subtract(rng) -> Turn:
    a, b = number(rng, 4), number(rng, 4)
    if a < b and rng.random() < 0.7:
        a, b = b, a
    forms = ("Subtract {1} from {0}.", "What is {0} minus {1}?", *signed("-"))
    return Turn(rng.choice(forms).format(a, b), str(a - b))


def times(rng, a: int, b: int) -> str:
    forms = ("Multiply {} by {}.", "What is {} times {}?", "What is {} x {}?", *signed("*"))
    return rng.choice(forms).format(a, b)


def multiply(rng) -> Turn:
    if rng.random() < 0.25:
        a, b = rng.randrange(100, 1000), rng.randrange(2, 10)
        if rng.random() < 0.3:
            a, b = b, a
    else:
        a, b = number(rng, 2), number(rng, 2)
    return Turn(times(rng, a, b), str(a * b))


def multiply_too_hard(rng) -> Turn:
    """Outside thinking mode the honest answer to a long product."""
    a, b = rng.randrange(100, 10000), rng.randrange(10, 100)
    if rng.random() < 0.3:
        a, b = b, a
    return Turn(times(rng, a, b), NEEDS_THOUGHT)


def divide(rng) -> Turn:
    b = rng.randrange(2, 13)
    exact = rng.random() < 0.5
    a = b * rng.randrange(1, 100) if exact else rng.randrange(b, 500)
    forms = ("Divide {} by {}.", "What is {} divided by {}?", *signed("/"))
    quotient, rest = divmod(a, b)
    return Turn(rng.choice(forms).format(a, b), f"{quotient} remainder {rest}" if rest else str(quotient))


def compare(rng) -> Turn:
    if rng.random() < 0.3:
        n = number(rng, 5)
        return Turn(rng.choice(("Is {} even or odd?", "Even or odd: {}?")).format(n), "odd" if n % 2 else "even")
    digits = rng.randint(2, 4)
    values = some(rng, range(10 ** (digits - 2), 10**digits), 2, 6)
    if rng.random() < 0.4:
        near = values[0] + rng.choice((-1, 1, 10))
        values = [*values[:-1], near] if near not in values else values
    listed = ", ".join(map(str, values))
    if len(values) == 2 and rng.random() < 0.5:
        big = rng.random() < 0.5
        which = rng.choice(("larger", "bigger", "greater") if big else ("smaller", "lower", "less"))
        return Turn(f"Which is {which}, {values[0]} or {values[1]}?", str(max(values) if big else min(values)))
    big = rng.random() < 0.5
    which = rng.choice(("largest", "biggest") if big else ("smallest", "lowest"))
    form = rng.choice(("Which is the {}: {}?", "Find the {} of {}.", "What is the {} number in {}?"))
    return Turn(form.format(which, listed), str(max(values) if big else min(values)))


def sequence(rng) -> Turn:
    """Long answers with nothing to get wrong but the next number."""
    step = rng.choice((1, 1, 1, 2, 3, 5, 10))
    start, count = rng.randrange(0, 100), rng.randint(3, 30)
    if rng.random() < 0.15:
        step, start, count = 1, rng.randrange(2), rng.randint(10, 120)
    values = [start + step * i for i in range(count)]
    form = "Count from {} to {}." if step == 1 else "Count from {} to {} in steps of {}."
    if rng.random() < 0.25:
        values.reverse()
        form = form.replace("Count", "Count down")
    return Turn(form.format(values[0], values[-1], step), " ".join(map(str, values)))


def long_product(rng) -> Turn:
    """Long multiplication, one line a digit, then running sums."""
    a, b = number(rng, 4), number(rng, 2)
    if rng.random() < 0.6:
        a, b = rng.randrange(100, 10000), rng.randrange(10, 100)
    lines, total = [], None
    parts = [a * int(d) * 10**i for i, d in enumerate(reversed(str(b)))]
    for i, d in enumerate(reversed(str(b))):
        if len(str(b)) > 1 and d != "0":
            lines.append(f"{a} * {int(d) * 10**i} = {parts[i]}")
    for part in (p for p, d in zip(parts, reversed(str(b))) if d != "0"):
        if total is not None:
            lines.append(f"{total} + {part} = {total + part}")
        total = part if total is None else total + part
    return Turn(times(rng, a, b), str(a * b), "\n".join([*lines, f"{a} * {b} = {a * b}"]))


def long_sum(rng) -> Turn:
    values = [number(rng, 4) for _ in range(rng.randint(3, 5))]
    forms = ("Add up {}.", "What is the sum of {}?", "Sum these numbers: {}.")
    text = rng.choice(forms).format(", ".join(map(str, values)))
    lines, total = [], values[0]
    for value in values[1:]:
        lines.append(f"{total} + {value} = {total + value}")
        total += value
    return Turn(text, str(total), "\n".join(lines))


THINGS = "pens apples coins cards books shells stamps buttons marbles eggs".split()


def word_problem(rng) -> Turn:
    """Two steps in words; the thought writes them as sums."""
    who, other, thing = name(rng), name(rng), rng.choice(THINGS)
    a, b = rng.randrange(2, 50), rng.randrange(2, 30)
    pick = rng.randrange(5)
    if pick == 0:
        # Giving nearly everything away leaves a small difference of large numbers, where the network slips.
        c = rng.randint(1, a * b // 2)
        text = f"{who} has {a} boxes with {b} {thing} each and gives {c} {thing} to {other}. How many {thing} does {who} have now?"
        lines, result = [f"{a} * {b} = {a * b}", f"{a * b} - {c} = {a * b - c}"], a * b - c
    elif pick == 1:
        c = rng.randrange(2, 90)
        text = f"{who} has {a} {thing}, finds {b} more and then buys {c}. How many {thing} does {who} have?"
        lines, result = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"], a + b + c
    elif pick == 2:
        text = f"{who} has {a} {thing}. {other} has {b} more than {who}. How many {thing} do they have together?"
        lines, result = [f"{a} + {b} = {a + b}", f"{a} + {a + b} = {2 * a + b}"], 2 * a + b
    elif pick == 3:
        c, d = rng.randrange(2, 30), rng.randrange(2, 30)
        text = f"A shop sells {thing} for {a} euros each and bags for {b} euros each. {who} buys {c} {thing} and {d} bags. How many euros is that?"
        lines = [f"{a} * {c} = {a * c}", f"{b} * {d} = {b * d}", f"{a * c} + {b * d} = {a * c + b * d}"]
        result = a * c + b * d
    else:
        share = rng.randrange(2, 50)
        c = rng.randrange(2, 10)
        total = share * c
        text = f"{who} shares {total} {thing} equally among {c} friends. Then each friend gets {a} more. How many {thing} does each friend have?"
        lines, result = [f"{total} / {c} = {share}", f"{share} + {a} = {share + a}"], share + a
    return Turn(text, str(result), "\n".join(lines))
