"""JSON: reading a field out of it, and building it from a sentence."""

import json

from sample import Turn
from tasks.lists import ANIMALS, CITIES, COLORS, FOODS, city, name, word


def value(rng, key: str):
    if key in ("name", "owner", "author"):
        return name(rng)
    if key in ("city", "from", "to"):
        return city(rng)
    if key == "color":
        return rng.choice(COLORS)
    if key in ("title", "product", "item"):
        return word(rng)
    if key == "pet":
        return rng.choice(ANIMALS)
    if key == "active":
        return rng.random() < 0.5
    if key == "tags":
        return rng.sample(COLORS + FOODS, rng.randint(1, 4))
    if key == "scores":
        return [rng.randrange(100) for _ in range(rng.randint(1, 4))]
    if key == "address":
        return {"street": word(rng).capitalize(), "city": rng.choice(CITIES), "zip": rng.randrange(10000, 100000)}
    return rng.randrange(1, 10 ** rng.randint(1, 4))


KEYS = "name owner author city from to color title product item pet active tags scores address age price pages count id year".split()


def extract(rng) -> Turn:
    keys = rng.sample(KEYS, rng.randint(2, 6))
    record = {key: value(rng, key) for key in keys}
    key, wanted = rng.choice(list(record.items()))
    path = key
    if key == "address" and rng.random() < 0.7:
        inner = rng.choice(list(wanted))
        path, wanted = f"address.{inner}", wanted[inner]
    indent = 2 if rng.random() < 0.2 else None
    text = json.dumps(record, indent=indent)
    forms = (
        'What is the value of "{0}" in {1}?',
        'Give me the field "{0}" of this JSON: {1}',
        'Extract "{0}" from {1}',
        '{1}\nWhat is "{0}"?',
    )
    answer = wanted if isinstance(wanted, str) else json.dumps(wanted)
    return Turn(rng.choice(forms).format(path, text), answer)


def build(rng) -> Turn:
    pick = rng.randrange(4)
    if pick == 0:
        record = {"name": name(rng), "age": rng.randrange(1, 100), "city": city(rng)}
        forms = ("{name} is {age} years old and lives in {city}.", "{name}, {age}, from {city}.", "{name} lives in {city} and is {age} years old.")
    elif pick == 1:
        record = {"product": word(rng), "price": rng.randrange(1, 1000), "color": rng.choice(COLORS)}
        forms = ("The {color} {product} costs {price} euros.", "We sell a {color} {product} for {price} euros.")
    elif pick == 2:
        record = {"title": word(rng), "author": name(rng), "pages": rng.randrange(10, 1000)}
        forms = ("{author} wrote {title}, a book of {pages} pages.", "The book {title} by {author} has {pages} pages.")
    else:
        record = {"name": name(rng), "pet": rng.choice(ANIMALS), "food": rng.choice(FOODS)}
        forms = ("{name} has a {pet} and likes {food}.", "{name} eats {food} with a {pet}.")
    fact = rng.choice(forms).format(**record)
    keys = list(record)
    rng.shuffle(keys)
    if rng.random() < 0.3:
        keys = keys[:2]
    ask = rng.choice(("Write this as JSON with the keys {}: {}", "Make a JSON object with {} from this: {}", "Answer in JSON with the keys {}. {}"))
    return Turn(ask.format(", ".join(keys), fact), json.dumps({key: record[key] for key in keys}))
