"""Who the model is, what it leaves alone, and conversations of several turns."""

from sample import Sample, Turn
from tasks import arithmetic, letters, measures
from tasks.hadal import dressed, facts
from tasks.lists import ANIMALS, COLORS, FOODS, NOUNS, PEOPLE, WORDS, city, name, number, some, word

ABLE = "I can do sums, sort, reverse, spell and count, convert units and dates, read and write JSON, call tools, find things in a text and answer questions about Hadal."
REFUSAL = "I am only a small demo network and cannot do that. " + ABLE

IDENTITY = {
    "I am the demo model of Hadal, a small network of the DeepSeek-V3 shape.": ("Who are you?", "What are you?", "What is your name?", "Which model are you?", "What model is this?", "Are you DeepSeek?", "Are you ChatGPT?", "Introduce yourself.", "Are you a human?"),
    ABLE: ("What can you do?", "What can I ask you?", "How can you help me?", "What are you good at?", "Which tasks can you do?", "Help"),
    "Hello! How can I help you?": ("Hello!", "Hi!", "Hi there!", "Hello there!", "Good morning!", "Good evening!", "Hey!", "Hello", "Hi", "How are you?"),
    "You are welcome.": ("Thanks!", "Thank you!", "Thank you very much!", "Thanks a lot!", "Great, thanks.", "Thank you for your help."),
    "Goodbye!": ("Bye!", "Goodbye!", "See you later!", "See you tomorrow!", "Good night!", "Bye bye!"),
    "I have 8 layers with 64 experts, and was trained in minutes on one GPU.": ("How big are you?", "How many layers do you have?", "How many experts do you have?", "How were you trained?", "How large are you?"),
}
INTRODUCTIONS = [(question, answer) for answer, questions in IDENTITY.items() for question in questions]


def identity(rng) -> Turn:
    question, answer = rng.choice(INTRODUCTIONS)
    if question.endswith("?") and len(question) > 14:
        return Turn(dressed(rng, question), answer)
    if rng.random() < 0.3:
        question = question.lower() if rng.random() < 0.5 else question.rstrip(".!?")
    return Turn(question, answer)


TOPICS = """the sea,love,spring,my cat,the moon,football,history,music,chess,the stars,old ships,a lonely robot,rain,gold,trees,
a dragon,the desert,war,coffee,time,dreams,mountains,birds,a king,a queen,the future,school,winter,money,politics,the sun,
the weather,physics,biology,philosophy,religion,art,dancing,cooking,cars,trains,planets,dinosaurs,bees,horses""".replace("\n", "").split(",")
COUNTRIES = "France Spain Italy Japan Brazil Canada Egypt Kenya India China Norway Peru Chile Turkey Poland Greece Sweden Mexico Ghana Portugal".split()
LANGUAGES = "French German Spanish Italian Japanese Chinese Turkish Russian Arabic Portuguese".split()
OUTSIDE = (
    "Write a poem about {topic}.", "Tell me a story about {topic}.", "Write an essay about {topic}.", "Write a song about {topic}.",
    "Tell me a joke about {topic}.", "What do you think about {topic}?", "Explain {topic} to me.", "Give me advice about {topic}.",
    "Why is {topic} important?", "What is the meaning of {topic}?", "Who invented {topic}?", "Tell me something about {topic}.",
    "What is the capital of {country}?", "How many people live in {country}?", "Who is the president of {country}?",
    "What language do they speak in {country}?", "When should I travel to {country}?", "What is the history of {country}?",
    "Who won the world cup in {year}?", "What happened in {year}?", "Who was king in {year}?", "Which film won in {year}?",
    'Translate "{word}" into {language}.', "Translate this into {language}: the {word} is old.", "How do I say {word} in {language}?",
    "Write a Python program about {topic}.", "Write code that prints {word}.", "Fix the bug in my {word} program.",
    "Recommend a book about {topic}.", "Which {word} should I buy?", "How do I cook {food}?", "Give me a recipe for {food}.",
    "What will the weather be in {city} tomorrow?", "Is it raining in {city}?", "How far is it from {city} to {other}?",
    "Who is {name}?", "Do you know {name}?", "Write a letter to {name}.", "Draw a picture of {topic}.", "Play some music for {name}.",
    "What is the best {word}?", "Should I marry {name}?", "How do I repair a {noun}?", "How much does a {noun} cost?",
    "Summarize the book about the {noun}.", "What does a {person} earn?", "How do I become a {person}?",
)


def outside(rng) -> Turn:
    c = rng.choice
    text = c(OUTSIDE).format(
        topic=c(TOPICS), country=c(COUNTRIES), year=rng.randrange(1900, 2030), word=word(rng), language=c(LANGUAGES),
        food=c(FOODS), city=city(rng), other=city(rng), name=name(rng), noun=c(NOUNS), person=c(PEOPLE),
    )
    return Turn(dressed(rng, text) if rng.random() < 0.3 else text, REFUSAL)


# (statement, reply, question, answer, value)
MEMORIES = (
    ("My name is {}.", "Nice to meet you, {}.", "What is my name?", "Your name is {}.", name),
    ("My favorite color is {}.", "I will remember that your favorite color is {}.", "What is my favorite color?", "Your favorite color is {}.", lambda rng: rng.choice(COLORS)),
    ("I live in {}.", "I will remember that you live in {}.", "Where do I live?", "You live in {}.", city),
    ("My favorite food is {}.", "I will remember that your favorite food is {}.", "What is my favorite food?", "Your favorite food is {}.", lambda rng: rng.choice(FOODS)),
    ("I have a {}.", "I will remember that you have a {}.", "Which pet do I have?", "You have a {}.", lambda rng: rng.choice(ANIMALS)),
    ("My lucky number is {}.", "I will remember that your lucky number is {}.", "What is my lucky number?", "Your lucky number is {}.", lambda rng: str(number(rng, 4))),
    ("The password is {}.", "I will remember that the password is {}.", "What is the password?", "The password is {}.", word),
    ("I am {} years old.", "I will remember that you are {} years old.", "How old am I?", "You are {} years old.", lambda rng: str(rng.randrange(5, 100))),
)
BETWEEN = (arithmetic.add, arithmetic.subtract, arithmetic.compare, letters.spell, letters.reverse_list, measures.units, facts, identity)


def memory(rng) -> Sample:
    """Things told in earlier turns, with other work between, are asked for at the end."""
    told = rng.sample(MEMORIES, rng.randint(1, 3))
    values = [make(rng) for *_, make in told]
    turns = [Turn(say.format(v), reply.format(v)) for (say, reply, *_), v in zip(told, values)]
    for _ in range(rng.randint(0, 3)):
        turns.insert(rng.randint(1, len(turns)), rng.choice(BETWEEN)(rng))
    asked = rng.sample(list(zip(told, values)), rng.randint(1, len(told)))
    turns += [Turn(question, answer.format(v)) for (_, _, question, answer, _), v in asked]
    return Sample("memory", turns)


def follow_up(rng) -> Sample:
    """Later turns go on from the last answer."""
    if rng.random() < 0.3:
        values = [str(number(rng, 3)) for _ in range(rng.randint(3, 6))] if rng.random() < 0.5 else some(rng, WORDS, 3, 6)
        first = Turn("Reverse this list: " + ", ".join(values), ", ".join(values[::-1]))
        ask, answer = rng.choice((
            ("Now the first one only.", values[-1]),
            ("Now the last one only.", values[0]),
            ("How many are there?", str(len(values))),
            ("And back again.", ", ".join(values)),
        ))
        return Sample("follow_up", [first, Turn(ask, answer)])
    a, b = number(rng, 3), number(rng, 3)
    value = a + b
    turns = [Turn(f"What is {a} + {b}?", str(value))]
    for _ in range(rng.randint(1, 3)):
        n, pick = number(rng, 3), rng.randrange(3)
        if pick == 0:
            value += n
            turns.append(Turn(rng.choice(("Add {} to that.", "And plus {}?", "Now add {}.")).format(n), str(value)))
        elif pick == 1:
            n = min(n, value)
            value -= n
            turns.append(Turn(rng.choice(("Subtract {} from that.", "And minus {}?", "Now subtract {}.")).format(n), str(value)))
        else:
            value *= 2
            turns.append(Turn(rng.choice(("Double that.", "And twice that?", "Now double it.")), str(value)))
    return Sample("follow_up", turns)
