"""Tool calls: choose the tool, fill its arguments, then say what its output means."""

import json

from sample import Sample, Turn
from tasks import arithmetic, letters
from tasks.hadal import facts
from tasks.lists import city, name, number, word
from tasks.measures import DAYS
from tasks.talk import identity

NO_TOOL = "I have no tool for that."


def clock_time(rng) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


POOLS = ("prefill", "decode")
ROOMS = "kitchen bathroom bedroom hall garage office cellar attic".split()
SKIES = "sun rain snow fog wind clouds".split()

# Each tool: names, descriptions, {parameter: (names, type, description, value)}, ways to ask, output, reply.
# In asks, outputs and replies a parameter stands under its own key.
TOOLS = (
    dict(
        names=("get_weather", "weather", "current_weather"), about=("Get the current weather in a city", "Current weather of a place"),
        params={"city": (("city", "location", "place"), "string", "Name of the city", city)},
        asks=("What is the weather in {city}?", "How is the weather in {city} now?", "Weather in {city}, please."),
        out=lambda rng: {"temperature": rng.randrange(-20, 40), "sky": rng.choice(SKIES)}, reply="It is {temperature} degrees in {city} with {sky}.",
    ),
    dict(
        names=("get_time", "local_time", "clock"), about=("Get the local time of a city", "Local time in a place"),
        params={"city": (("city", "location", "place"), "string", "Name of the city", city)},
        asks=("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"),
        out=lambda rng: {"time": clock_time(rng)}, reply="It is {time} in {city}.",
    ),
    dict(
        names=("convert_currency", "exchange", "currency"), about=("Convert an amount of money", "Convert money between currencies"),
        params={"amount": (("amount", "value"), "integer", "Amount of money", lambda rng: number(rng, 4)), "from": (("from", "source"), "string", "Currency to convert from", lambda rng: rng.choice(("EUR", "USD", "GBP"))), "to": (("to", "target"), "string", "Currency to convert to", lambda rng: rng.choice(("JPY", "CHF", "SEK", "INR")))},
        asks=("Convert {amount} {from} to {to}.", "How much is {amount} {from} in {to}?"),
        out=lambda rng: {"result": number(rng, 5)}, reply="{amount} {from} are {result} {to}.",
    ),
    dict(
        names=("set_timer", "start_timer", "timer"), about=("Set a timer", "Start a timer for some minutes"),
        params={"minutes": (("minutes", "duration"), "integer", "Minutes until it rings", lambda rng: rng.randrange(2, 120))},
        asks=("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.", "Wake me in {minutes} minutes."),
        out=lambda rng: {"status": "ok"}, reply="The timer is set for {minutes} minutes.",
    ),
    dict(
        names=("send_message", "message", "send_text"), about=("Send a message to somebody", "Send a text to a person"),
        params={"to": (("to", "recipient", "person"), "string", "Who gets the message", name), "text": (("text", "body", "message"), "string", "The message", lambda rng: " ".join(word(rng, 0.1) for _ in range(rng.randint(1, 4))))},
        asks=('Send "{text}" to {to}.', 'Tell {to} this: "{text}"', 'Write "{text}" to {to}.'),
        out=lambda rng: {"status": "sent"}, reply="I sent the message to {to}.",
    ),
    dict(
        names=("find_train", "next_train", "train_search"), about=("Find the next train between two cities", "Search for a train"),
        params={"from": (("from", "origin", "start"), "string", "City of departure", city), "to": (("to", "destination"), "string", "City of arrival", city)},
        asks=("When is the next train from {from} to {to}?", "Find a train from {from} to {to}.", "I need a train to {to} from {from}."),
        out=lambda rng: {"departs": clock_time(rng), "platform": rng.randrange(1, 30)}, reply="The next train from {from} to {to} departs at {departs} from platform {platform}.",
    ),
    dict(
        names=("create_event", "add_event", "calendar_add"), about=("Add an event to the calendar", "Create a calendar entry"),
        params={"title": (("title", "name", "event"), "string", "Title of the event", word), "day": (("day", "weekday"), "string", "Day of the week", lambda rng: rng.choice(DAYS))},
        asks=("Add {title} to my calendar on {day}.", "Put {title} on {day} in my calendar.", "I have {title} on {day}, note it down."),
        out=lambda rng: {"status": "created"}, reply="I added {title} on {day}.",
    ),
    dict(
        names=("get_user", "lookup_user", "user_info"), about=("Look up a user by number", "Find the name of a user"),
        params={"id": (("id", "user_id", "number"), "integer", "Number of the user", lambda rng: number(rng, 5))},
        asks=("Who is user {id}?", "Look up user {id}.", "What is the name of user {id}?"),
        out=lambda rng: {"name": name(rng)}, reply="User {id} is {name}.",
    ),
    dict(
        names=("turn_on_light", "light_on", "lamp_on"), about=("Turn on the light in a room", "Switch a light on"),
        params={"room": (("room", "location"), "string", "Name of the room", lambda rng: rng.choice(ROOMS))},
        asks=("Turn on the light in the {room}.", "Light in the {room}, please.", "It is dark in the {room}, switch on the light."),
        out=lambda rng: {"status": "on"}, reply="The light in the {room} is on.",
    ),
    dict(
        names=("scale_pool", "set_replicas", "resize_pool"), about=("Set the number of replicas of a pool", "Scale a pool of workers"),
        params={"pool": (("pool", "name"), "string", "prefill or decode", lambda rng: rng.choice(POOLS)), "replicas": (("replicas", "count", "size"), "integer", "Number of replicas", lambda rng: rng.randrange(1, 200))},
        asks=("Scale the {pool} pool to {replicas} replicas.", "Give the {pool} pool {replicas} replicas.", "Set the {pool} pool to {replicas}."),
        out=lambda rng: {"status": "scaled"}, reply="The {pool} pool now has {replicas} replicas.",
    ),
    dict(
        names=("pool_status", "get_pool", "pool_info"), about=("Show the state of a pool", "How many workers of a pool are ready"),
        params={"pool": (("pool", "name"), "string", "prefill or decode", lambda rng: rng.choice(POOLS))},
        asks=("How many workers of the {pool} pool are ready?", "Show me the {pool} pool.", "What is the state of the {pool} pool?"),
        out=lambda rng: {"ready": rng.randrange(50), "total": rng.randrange(50, 100)}, reply="{ready} of {total} workers of the {pool} pool are ready.",
    ),
    dict(
        names=("restart_worker", "restart", "kill_worker"), about=("Restart a worker", "Restart one worker by its name"),
        params={"worker": (("worker", "name", "pod"), "string", "Name of the worker", lambda rng: f"{rng.choice(POOLS)}-{rng.randrange(100)}")},
        asks=("Restart {worker}.", "Please restart the worker {worker}.", "The worker {worker} hangs, restart it."),
        out=lambda rng: {"status": "restarted"}, reply="The worker {worker} was restarted.",
    ),
    dict(
        names=("get_price", "price", "product_price"), about=("Get the price of a product", "Look up what a product costs"),
        params={"product": (("product", "item", "article"), "string", "Name of the product", word)},
        asks=("What does {product} cost?", "What is the price of {product}?", "How much is the {product}?"),
        out=lambda rng: {"price": number(rng, 4)}, reply="The price of {product} is {price} euros.",
    ),
    dict(
        names=("book_table", "reserve_table", "table_booking"), about=("Book a table in a restaurant", "Reserve a table"),
        params={"people": (("people", "guests", "persons"), "integer", "How many people", lambda rng: rng.randrange(1, 20)), "time": (("time", "hour"), "string", "Time as HH:MM", clock_time)},
        asks=("Book a table for {people} at {time}.", "Reserve a table at {time} for {people} people.", "We are {people} and want to eat at {time}, book a table."),
        out=lambda rng: {"status": "booked"}, reply="A table for {people} is booked at {time}.",
    ),
)


def instance(rng, tool: dict) -> dict:
    """The tool as one application offers it: one of its names, and names for its parameters."""
    return {
        "tool": tool, "name": rng.choice(tool["names"]), "about": rng.choice(tool["about"]),
        "keys": {key: rng.choice(names) for key, (names, *_) in tool["params"].items()},
    }


def schema(offer: dict) -> dict:
    params = offer["tool"]["params"]
    properties = {offer["keys"][key]: {"type": kind, "description": text} for key, (_, kind, text, _) in params.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": offer["name"], "description": offer["about"], "parameters": parameters}
    return {"type": "function", "function": function}


def ask(rng, offer: dict) -> tuple[dict, tuple[str, dict], dict]:
    """-> (values by key, the right call, the tool's output)."""
    tool = offer["tool"]
    values = {key: make(rng) for key, (_, _, _, make) in tool["params"].items()}
    call = (offer["name"], {offer["keys"][key]: value for key, value in values.items()})
    return values, call, tool["out"](rng)


def offers(rng, low: int, high: int) -> list[dict]:
    chosen = [instance(rng, tool) for tool in rng.sample(TOOLS, rng.randint(low, high))]
    return chosen if len({offer["name"] for offer in chosen}) == len(chosen) else offers(rng, low, high)


def tool_use(rng) -> Sample:
    """One call, or two of the same tool, then an answer from the output."""
    available = offers(rng, 1, 4)
    offer = rng.choice(available)
    tool = offer["tool"]
    values, call, output = ask(rng, offer)
    calls, outputs = [call], [output]
    text = rng.choice(tool["asks"]).format(**values)
    reply = tool["reply"].format(**values, **output)
    if len(values) == 1 and rng.random() < 0.2:
        more, second, result = ask(rng, offer)
        if more != values:
            calls.append(second)
            outputs.append(result)
            text += " " + rng.choice(tool["asks"]).format(**more)
            reply += " " + tool["reply"].format(**more, **result)
    turn = Turn(text, "", f"I call {offer['name']}.", calls, [json.dumps(o) for o in outputs], reply)
    return Sample("tool_use", [turn], tools=[schema(o) for o in available])


def tool_unneeded(rng) -> Sample:
    """Tools are there, but the question needs none of them, or one that is missing."""
    available = offers(rng, 1, 4)
    if rng.random() < 0.4:
        present = [offer["tool"]["about"] for offer in available]
        missing = rng.choice([tool for tool in TOOLS if tool["about"] not in present])
        values, _, _ = ask(rng, instance(rng, missing))
        turn = Turn(rng.choice(missing["asks"]).format(**values), NO_TOOL)
    else:
        turn = rng.choice((arithmetic.add, arithmetic.subtract, letters.spell, letters.sort_numbers, facts, identity))(rng)
    return Sample("tool_unneeded", [turn], tools=[schema(o) for o in available])
