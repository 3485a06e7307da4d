"""Word lists and random text that the tasks share. All of it is our own."""

WORDS = """apple anchor arrow autumn bakery balloon banana basket beach bicycle blanket blossom bottle branch bread bridge
brother bucket butter button cabin camera candle canyon carpet carrot castle cellar chair cheese cherry circle clever
cloud coffee copper corner cotton cousin cradle cricket crystal curtain dancer desert dinner doctor dolphin donkey
dragon drawer eagle early earth elbow engine evening fabric falcon family farmer feather fellow fiddle finger flower
forest fossil fountain friend garden gentle giant ginger glacier globe golden grammar granite grape guitar hammer
harbor harvest hazel helmet hidden hollow honest honey horizon hornet house hunter island ivory jacket jasmine jelly
jewel journey jungle kettle kitchen kitten ladder lagoon lantern lemon letter library lizard magnet mango maple marble
market meadow melon memory metal minute mirror mitten monkey morning mountain museum music napkin needle nephew nickel
night noble noodle number oasis ocean olive onion orange orchard otter oyster paddle palace panda paper parade parrot
pebble pencil pepper piano picture pigeon pillow pilot planet plenty pocket potato powder puzzle quarry quartz queen
quiet rabbit radish raven ribbon river robin rocket saddle salmon sandal school season secret shadow silver singer
sister skipper smooth soldier spider spoon spring square squirrel station stone storm strawberry street summer sunset
table tailor teacher temple thimble thunder ticket tiger timber tomato travel trumpet tulip tunnel turtle umbrella
valley vanilla velvet village violet violin walnut water weather whale wheel whisper window winter wizard wonder wooden
yellow yogurt zebra zipper""".split()

NAMES = """Ada Alan Alma Amir Anna Arne Bela Boris Carla Cem Chen Clara Dana David Diego Elena Elif Emil Erik Eva Farid
Fiona Flora Grace Greta Hana Hugo Ida Igor Ines Ivan Jana Jonas Jorge Julia Kai Karim Kira Lars Laura Leila Leo Lina
Luca Maja Marco Maria Maya Mei Milan Mina Nadia Nina Noah Nora Olga Omar Oscar Paul Petra Pia Rosa Ruben Sami Sara Sofia
Sven Tara Theo Tim Uma Vera Viktor Wanda Yara Yuki Zoe""".split()

CITIES = """Accra Amman Athens Berlin Bern Bogota Boston Cairo Chicago Dakar Delhi Dublin Geneva Hanoi Havana Helsinki
Istanbul Kyoto Lagos Lima Lisbon London Madrid Malmo Milan Nairobi Naples Oslo Paris Porto Prague Quito Riga Rome Seoul
Sofia Sydney Tokyo Toronto Tunis Turin Vienna Warsaw Zurich""".split()

COLORS = "red blue green yellow purple orange black white brown pink gray silver".split()
FOODS = "rice soup pasta bread cheese salad curry pizza noodles beans fish cake".split()
ANIMALS = "cat dog horse parrot rabbit turtle goat hamster pony duck".split()

ADJECTIVES = """amber ancient brave bright broken calm clever copper cold crimson dusty early empty faded gentle golden
heavy hidden hollow humble icy iron ivory lonely lucky mossy narrow noisy old pale proud quiet rusty sandy shiny silent
silver sleepy small smooth steep stony sunny tall tiny velvet wild windy wooden young""".split()

NOUNS = """anchor barn bell boat bridge cabin candle castle chest clock crane drum engine falcon ferry fountain garden
gate harbor island kettle ladder lamp lantern lighthouse lion mill mirror owl piano pond quarry raven river robot
saddle ship statue tower train trumpet tunnel turtle violin wagon whale windmill wolf""".split()

PEOPLE = "baker captain carpenter doctor farmer fisher gardener hunter miller nurse painter pilot poet sailor tailor teacher".split()
VERBS = "admired bought built carried cleaned drew found guarded hid lost moved opened painted repaired sold watched".split()
PLACES = """at the market,before breakfast,behind the hill,by the lake,during the storm,in the forest,in the morning,near
the station,next to the church,on the roof,on Monday,over the winter,under the bridge,without a word,for a friend,with
great care""".replace("\n", " ").split(",")

ONSETS = "b bl br c ch d dr f fl g gr h j k kr l m n p pl pr qu r s sh sk st t th tr v w z".split()
VOWELS = "a e i o u ai ea oo".split()
ENDS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "nd", "x"]


def pseudo_word(rng, syllables: int | None = None) -> str:
    """A word that no list holds, such as `braloon`."""
    parts = syllables or rng.randint(2, 3)
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(parts)) + rng.choice(ENDS)


def word(rng, invented: float = 0.3) -> str:
    return pseudo_word(rng) if rng.random() < invented else rng.choice(WORDS)


def name(rng, invented: float = 0.3) -> str:
    return pseudo_word(rng, 2).capitalize() if rng.random() < invented else rng.choice(NAMES)


def city(rng, invented: float = 0.2) -> str:
    return pseudo_word(rng, 2).capitalize() if rng.random() < invented else rng.choice(CITIES)


def sentence(rng) -> str:
    c = rng.choice
    thing = f"{c(('a', 'the', 'the', 'his', 'her'))} {c(ADJECTIVES)} {c(NOUNS)}"
    return f"The {c(ADJECTIVES)} {c(PEOPLE)} {c(VERBS)} {thing} {c(PLACES)}."


def number(rng, digits: int) -> int:
    """All lengths up to `digits` are equally likely."""
    length = rng.randint(1, digits)
    return rng.randrange(0 if length == 1 else 10 ** (length - 1), 10**length)


def some(rng, pool, low: int, high: int) -> list:
    """Between `low` and `high` different members of `pool`."""
    return rng.sample(pool, rng.randint(low, high))
