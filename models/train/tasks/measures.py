"""Units, weekdays, dates and clock times."""

import calendar
from datetime import date, timedelta

from sample import Turn

# (from, to, factor, largest value asked)
UNITS = (
    ("kilometers", "meters", 1000, 999), ("meters", "centimeters", 100, 999), ("centimeters", "millimeters", 10, 999),
    ("meters", "millimeters", 1000, 999), ("kilograms", "grams", 1000, 999), ("tons", "kilograms", 1000, 999),
    ("liters", "milliliters", 1000, 999), ("hours", "minutes", 60, 99), ("minutes", "seconds", 60, 99),
    ("days", "hours", 24, 60), ("weeks", "days", 7, 99), ("years", "months", 12, 99), ("dozens", "pieces", 12, 99),
    ("feet", "inches", 12, 99), ("yards", "feet", 3, 99), ("bytes", "bits", 8, 99),
)


def units(rng) -> Turn:
    big, small, factor, limit = rng.choice(UNITS)
    n = rng.randint(2, limit)
    if rng.random() < 0.6:
        forms = ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}.", "{0} {1} in {2}?")
        return Turn(rng.choice(forms).format(n, big, small), f"{n * factor} {small}")
    forms = ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}.", "{0} {1} in {2}?")
    return Turn(rng.choice(forms).format(n * factor, small, big), f"{n} {big}")


DAYS = list(calendar.day_name)
MONTHS = list(calendar.month_name)[1:]


def weekday(rng) -> Turn:
    day, n = rng.randrange(7), rng.randint(1, 30)
    if rng.random() < 0.3:
        forms = ("Today is {0}. What day was it {1} days ago?", "What day is {1} days before {0}?")
        n = -n
    else:
        forms = ("Today is {0}. What day is it in {1} days?", "What day is {1} days after {0}?")
    text = rng.choice(forms).format(DAYS[day], abs(n)).replace(" 1 days", " 1 day")
    return Turn(text, DAYS[(day + n) % 7])


def weekday_aloud(rng) -> Turn:
    day, n = rng.randrange(7), rng.randint(10, 999)
    text = rng.choice(("Today is {0}. What day is it in {1} days?", "What day is {1} days after {0}?")).format(DAYS[day], n)
    weeks, rest = divmod(n, 7)
    thought = f"{n} / 7 = {weeks} remainder {rest}\n{DAYS[day]} + {rest} = {DAYS[(day + rest) % 7]}"
    return Turn(text, DAYS[(day + n) % 7], thought)


def months(rng) -> Turn:
    pick = rng.randrange(4)
    m = rng.randrange(12)
    if pick == 0:
        year = rng.randint(1900, 2100)
        form = rng.choice(("How many days does {} {} have?", "How many days are in {} {}?"))
        return Turn(form.format(MONTHS[m], year), str(calendar.monthrange(year, m + 1)[1]))
    if pick == 1:
        year = rng.randint(1900, 2100)
        form = rng.choice(("Is {} a leap year?", "Was or is {} a leap year?"))
        return Turn(form.format(year), "yes" if calendar.isleap(year) else "no")
    if pick == 2:
        n = rng.randint(1, 11)
        text = f"Which month is {n} month{'s' if n > 1 else ''} after {MONTHS[m]}?"
        return Turn(text, MONTHS[(m + n) % 12])
    form = rng.choice(("What number is the month {}?", "Which month of the year is {}?"))
    return Turn(form.format(MONTHS[m]), str(m + 1))


def next_date(rng) -> Turn:
    day = date(2000, 1, 1) + timedelta(days=rng.randrange(365 * 40))
    if rng.random() < 0.4:
        # Near the end of a month, where it is hard.
        last = calendar.monthrange(day.year, day.month)[1]
        day = day.replace(day=rng.randint(last - 6, last))
    n = rng.randint(1, 14)
    days = f"{n} day{'s' if n > 1 else ''}"
    form = rng.choice(("What date is {} after {}?", "Which date comes {} after {}?"))
    return Turn(form.format(days, day.isoformat()), (day + timedelta(days=n)).isoformat())


def clock(rng) -> Turn:
    start, n = rng.randrange(1440), rng.choice((rng.randint(1, 59), rng.randrange(5, 180, 5)))
    later = (start + n) % 1440
    form = rng.choice(("What time is it {1} minutes after {0}?", "It is {0}. What time is it in {1} minutes?"))
    text = form.format(f"{start // 60:02}:{start % 60:02}", n).replace(" 1 minutes", " 1 minute")
    return Turn(text, f"{later // 60:02}:{later % 60:02}")
