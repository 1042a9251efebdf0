"""What the demo model knows: capitals, days, months, itself; and what it says when it does not know."""

from __future__ import annotations

import random

from demo.world.sample import Problem
from demo.world.words import (
    CAPITALS,
    DAYS,
    MONTHS,
    NAMES,
    UNKNOWN_COUNTRIES,
    made_up,
    proper,
    thing,
    words_of,
)

_ORDINALS = words_of("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")


def capital(rng: random.Random) -> Problem:
    """The capital of a country, the country of a capital, or that it is not known."""
    kind = rng.random()
    if kind < 0.16:
        country = rng.choice(UNKNOWN_COUNTRIES) if rng.random() < 0.5 else made_up(rng).capitalize()
        return Problem(
            "capital",
            _ask_capital(rng, country),
            f"The capital of {country}?",
            "Not known.",
            "",
            f"I do not know the capital of {country}.",
            "unknown",
        )
    country, city = rng.choice(list(CAPITALS.items()))
    if kind < 0.75:
        return Problem(
            "capital",
            _ask_capital(rng, country),
            f"The capital of {country}?",
            f"{country}: {city}.",
            f"Check: {city} is in {country}.",
            f"The capital of {country} is {city}.",
            city,
            city,
            ("answer", "capital", "city"),
        )
    question = rng.choice(("{c} is the capital of which country?", "Which country has the capital {c}?"))
    return Problem(
        "capital",
        question.format(c=city),
        f"The country of {city}?",
        f"{city}: {country}.",
        f"Check: the capital of {country} is {city}.",
        f"{city} is the capital of {country}.",
        country,
        country,
        ("answer", "country"),
    )


def _ask_capital(rng: random.Random, country: str) -> str:
    asks = (
        "What is the capital of {c}?",
        "Capital of {c}?",
        "Which city is the capital of {c}?",
        "Tell me the capital of {c}.",
    )
    return rng.choice(asks).format(c=country)


def calendar(rng: random.Random) -> Problem:
    """Days and months: before, after, so many days later, how many days."""
    names, unit = (DAYS, "day") if rng.random() < 0.5 else (list(MONTHS), "month")
    size, at = len(names), rng.randrange(len(names))
    name, kind = names[at], rng.random()
    keys = ("answer", unit, "name")
    if kind < 0.45:
        word, step = rng.choice((("after", 1), ("before", -1)))
        found = names[(at + step) % size]
        question = rng.choice(
            (
                f"What {unit} comes {word} {name}?",
                f"Which {unit} is {word} {name}?",
                f"What is the {unit} {word} {name}?",
            )
        )
        return Problem(
            "calendar",
            question,
            f"The {unit} {word} {name}?",
            f"{name}: {found}.",
            f"Check: {name} is {'before' if step > 0 else 'after'} {found}.",
            f"The {unit} {word} {name} is {found}.",
            found,
            found,
            keys,
        )
    if kind < 0.75 or unit == "day":
        count = rng.randrange(2, 7)
        chain = " ".join(f"{i} {names[(at + i) % size]}" for i in range(1, count + 1))
        found = names[(at + count) % size]
        question = rng.choice(
            (
                f"What {unit} is {count} {unit}s after {name}?",
                f"Which {unit} is it {count} {unit}s after {name}?",
            )
        )
        return Problem(
            "calendar",
            question,
            f"Count {count} {unit}s from {name}.",
            f"{name}: {chain}.",
            f"Check: {count} steps.",
            f"{count} {unit}s after {name} is {found}.",
            found,
            found,
            keys,
        )
    if kind < 0.88:
        count = MONTHS[name]
        question = rng.choice((f"How many days are in {name}?", f"How many days does {name} have?"))
        extra = " (29 in a leap year)" if name == "February" else ""
        return Problem(
            "calendar",
            question,
            f"The days of {name}?",
            f"{name}: {count}.",
            "",
            f"{name} has {count} days{extra}.",
            str(count),
            count,
            ("answer", "days", "number"),
        )
    word = _ORDINALS[at]
    return Problem(
        "calendar",
        f"What is the {word} month?",
        f"Month {at + 1}?",
        f"{at + 1}: {name}.",
        "",
        f"The {word} month is {name}.",
        name,
        name,
        keys,
    )


SELF = "I am the demo model of mlx_gptoss: a tiny gpt-oss, trained from scratch on a small world."
CAN = "I can do small sums, letters, lists, capitals, days and months, call tools and answer in JSON."
CANNOT = "I am a tiny demo model and do not know that. Ask me for a sum, a list, a capital or a tool."
_ABOUT = (
    (
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "What is your name?",
            "Which model are you?",
            "Who is this?",
            "Introduce yourself.",
        ),
        SELF,
    ),
    (
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "Help",
            "What can I ask you?",
            "What are you good at?",
            "help me",
        ),
        CAN,
    ),
    (
        (
            "Are you ChatGPT?",
            "Are you GPT-4?",
            "Are you gpt-oss-20b?",
            "Are you a large model?",
            "Are you human?",
            "Are you a person?",
        ),
        "No. " + SELF,
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How large are you?", "What size are you?"),
        "I have about three million parameters: a toy beside gpt-oss-20b.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "How were you trained?"),
        "The authors of mlx_gptoss trained me from scratch on generated conversations.",
    ),
    (
        ("Hi", "Hello", "Hey", "hi", "hello", "hey there", "Good morning", "Hi there!", "Hello!", "hello?"),
        "Hello! Ask me for a sum, a list, a capital or a tool.",
    ),
    (
        ("How are you?", "How are you doing?", "What's up?", "how are you"),
        "I am fine, thank you. What can I do for you?",
    ),
    (
        ("Thanks", "Thank you", "Thanks!", "thank you", "Great, thanks", "Thank you very much!"),
        "You are welcome.",
    ),
    (("Bye", "Goodbye", "bye", "See you", "Good night", "See you later"), "Goodbye!"),
    (
        ("ok", "OK", "Good", "Nice", "Cool", "Well done!", "Great", "Yes", "No"),
        "Ask me something else if you like.",
    ),
)


def about(rng: random.Random) -> Problem:
    """Questions about the model itself, and small talk."""
    asks, answer = rng.choice(_ABOUT)
    return Problem(
        "about", rng.choice(asks), "The user talks to me.", "I answer plainly.", "", answer, answer
    )


_BEYOND = (
    "Why is the sky {x}?",
    "Why is the sky blue?",
    "Write a poem about {t}s.",
    "Write a {t} story.",
    "Tell me a joke.",
    "Who is the president of {c}?",
    "Who was {p}?",
    "What is the meaning of life?",
    "How do I cook {t}?",
    "Explain {t} to me.",
    "What is a {t}?",
    "Translate {t} to {c}.",
    "How old is {p}?",
    "Where is {p}?",
    "Why do {t}s {x}?",
    "Write code for a {t}.",
    "Write a Python function that sorts a list.",
    "Who wrote {p}?",
    "What happened in 1{n}?",
    "How far is {p} from {c}?",
    "Explain quantum mechanics.",
    "Tell me a story.",
    "What is the weather in {c}?",
    "What is the weather like today?",
    "Recommend a book.",
    "How does a {t} work?",
    "What is the best {t}?",
    "Can you sing?",
    "Do you like {t}s?",
    "What is love?",
    "How many people live in {c}?",
    "What is the square root of {n}?",
    "What is {n} divided by 7?",
    "Who invented the {t}?",
    "Where can I buy a {t}?",
    "Summarize the book {p}.",
    "Draw a {t}.",
    "What language do they speak in {c}?",
    "What time is it?",
    "Explain how computers work.",
    "What is machine learning?",
    "How tall is {p}?",
    "When was {p} born?",
    "Is {p} a good {t}?",
    "Give me advice about {t}s.",
    "What should I eat today?",
    "Tell me about {c}.",
    "What is the population of {c}?",
    "Write an email to {p}.",
    "Why are {t}s {x}?",
    "What does {x} mean?",
)


def beyond(rng: random.Random) -> Problem:
    """A question outside the world: an honest no."""
    question = rng.choice(_BEYOND).format(
        t=thing(rng),
        x=rng.choice((thing(rng), made_up(rng))),
        c=rng.choice(list(CAPITALS)),
        p=proper(rng) if rng.random() < 0.7 else rng.choice(NAMES),
        n=rng.randrange(100, 1000),
    )
    return Problem("beyond", question, "That is outside my small world.", "I say so.", "", CANNOT, CANNOT)


def date(rng: random.Random, current: str | None) -> Problem:
    """Today's date, read from the system message."""
    question = rng.choice(
        ("What is today's date?", "What is the date today?", "What day is it today?", "Which date is it?")
    )
    if current is None:
        final = "I was not told the date."
        return Problem("date", question, "The date?", "Not given.", "", final, final)
    return Problem(
        "date",
        question,
        "The date?",
        f"It is {current}.",
        "",
        f"Today is {current}.",
        current,
        current,
        ("answer", "date"),
    )
