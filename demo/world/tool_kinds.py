"""Kinds of tools: declared functions whose names, parameters and values the model has to read.

A `Use` is one function together with a question that it fits, the right arguments and a possible result.
Function and parameter names are drawn from large pools or made up, so only the declaration tells them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from demo.world.words import ADJECTIVES, ATTRIBUTES, KINDS, THINGS, made_up, proper, thing, words_of
from mlx_gptoss.harmony.types import Tool


@dataclass(frozen=True)
class Use:
    """A tool, a question for it, its arguments; `want` is the wish in few words, `answer` frames a result."""

    key: str
    tool: Tool
    question: str
    arguments: dict[str, Any]
    want: str
    result: Any
    answer: str
    again: Callable[[random.Random], tuple[str, Use]] | None = None


def _name(rng: random.Random, *words: str) -> str:
    """A function's name from words: snake case, now and then camel case or wholly made up."""
    kind = rng.random()
    if kind < 0.1:
        return made_up(rng, 2)
    if kind < 0.16:
        return f"{made_up(rng, 1)}_{words[-1]}"
    if kind < 0.25:
        return words[0] + "".join(w.capitalize() for w in words[1:])
    return "_".join(words)


def _schema(rng: random.Random, described: dict[str, dict[str, Any]], required: list[str]) -> dict[str, Any]:
    """An object schema; titles and closed objects vary as real declarations do."""
    schema: dict[str, Any] = {"type": "object", "properties": described, "required": required}
    if rng.random() < 0.3:
        schema["additionalProperties"] = False
    return schema


def _text(rng: random.Random, description: str) -> dict[str, Any]:
    return {"type": "string", "description": description} if rng.random() < 0.5 else {"type": "string"}


def _whole(rng: random.Random, description: str) -> dict[str, Any]:
    kind = rng.choice(("integer", "integer", "number"))
    return {"type": kind, "description": description} if rng.random() < 0.5 else {"type": kind}


_UNITS = words_of("degrees euros people points meters kg miles")
_SKIES = words_of("sunny cloudy rainy windy clear snowy")


def _result(rng: random.Random, what: str) -> Any:
    """Text, a number, or an object, as a function might return."""
    kind = rng.random()
    if kind < 0.25:
        return rng.randrange(1000)
    if kind < 0.5:
        return f"{rng.randrange(100)} {rng.choice(_UNITS)}"
    if kind < 0.65:
        return rng.choice((rng.choice(ADJECTIVES), made_up(rng), proper(rng)))
    if kind < 0.75:
        return f"{rng.randrange(40)} degrees and {rng.choice(_SKIES)}"
    if kind < 0.85:
        return {what: rng.choice((rng.randrange(100), made_up(rng)))}
    return {what: rng.randrange(100), thing(rng): rng.choice((thing(rng), rng.choice(ADJECTIVES)))}


def attribute(rng: random.Random) -> Use:
    """Look something up about somebody: "What is the weather in Oslo?"."""
    what = made_up(rng, 2) if rng.random() < 0.15 else rng.choice(ATTRIBUTES)
    kind = rng.choice(KINDS)
    verb = rng.choice(("get", "get", "get", "find", "lookup", "fetch", "read", "check"))
    name = rng.choice((_name(rng, verb, what), _name(rng, verb, kind, what), _name(rng, what)))
    parameter = rng.choice((kind, kind, kind, "name", "query", "id", "location", "key", made_up(rng)))
    preposition = rng.choice(("of", "for", "in"))
    description = rng.choice(
        (
            f"Get the {what} {preposition} a {kind}.",
            f"Get the current {what} {preposition} a {kind}.",
            f"Look up the {what} {preposition} a {kind}.",
            f"Returns the {what} {preposition} the given {kind}.",
            f"{what.capitalize()} {preposition} a {kind}.",
        )
    )
    properties = {
        parameter: _text(rng, rng.choice((f"The {kind}", f"Name of the {kind}", f"{kind.capitalize()} name")))
    }
    required = [parameter]
    extra, tail = {}, ""
    if rng.random() < 0.3:
        option = rng.choice(("unit", "format", "mode", "units", made_up(rng)))
        choices = rng.choice(
            (
                ["celsius", "fahrenheit"],
                ["metric", "imperial"],
                ["short", "long"],
                [made_up(rng), made_up(rng)],
            )
        )
        properties[option] = {"type": "string", "enum": choices}
        if rng.random() < 0.4:
            properties[option]["default"] = choices[0]
        if rng.random() < 0.3:
            required.append(option)
        if rng.random() < 0.5 or option in required:
            extra = {option: rng.choice(choices)}
            tail = f" in {extra[option]}" if rng.random() < 0.5 else f" ({extra[option]})"
    tool = Tool(name, description, _schema(rng, properties, required))
    asks = ["What is the {w} {p} {v}{t}?"] * 3 + [
        "Tell me the {w} {p} {v}{t}.",
        "What's the {w} {p} {v}{t}?",
        "{w} {p} {v}{t}?",
        "Get the {w} {p} {v}{t}.",
        "I need the {w} {p} {v}{t}.",
        "Please look up the {w} {p} {v}{t}.",
    ]
    if what in ("weather", "schedule", "forecast", "status"):
        asks += ["How is the {w} {p} {v}{t}?"] * 3
    ask = rng.choice(asks)

    def use(r: random.Random, value: str | None = None) -> Use:
        v = value or (proper(r) if r.random() < 0.8 else thing(r))
        p = r.choice(("of", "for", "in"))
        return Use(
            f"attribute {what}",
            tool,
            ask.format(w=what, p=p, v=v, t=tail),
            {parameter: v, **extra},
            f"the {what} of {v}",
            _result(r, what),
            f"The {what} of {v} is {{r}}.",
            again,
        )

    def again(r: random.Random) -> tuple[str, Use]:
        one = use(r)
        return r.choice(("And {p} {v}{t}?", "And {v}{t}?", "What about {v}{t}?", "Now {p} {v}{t}.")).format(
            p=r.choice(("of", "for", "in")), v=one.arguments[parameter], t=tail
        ), one

    return use(rng)


def message(rng: random.Random) -> Use:
    """Send words to somebody."""
    what = rng.choice(("message", "email", "text", "note", "letter", "reminder"))
    verb = rng.choice(("send", "write", "post"))
    to = rng.choice(("to", "recipient", "person", "name", "receiver", made_up(rng)))
    body = rng.choice(("text", "body", "message", "content", "words", made_up(rng)))
    if to == body:
        body = "text"
    who, words = proper(rng), " ".join(thing(rng) for _ in range(rng.choice((1, 2, 3))))
    properties = {to: _text(rng, "Who gets it"), body: _text(rng, f"The {what}")}
    if rng.random() < 0.3:
        properties = {
            body: {"type": "string", "description": f"The {what}"},
            to: {"type": "string", "description": "Who gets it"},
        }
    elif to not in ("to", "recipient", "person", "name", "receiver") or body not in (
        "text",
        "body",
        "content",
        "words",
    ):
        properties[to]["description"], properties[body]["description"] = "Who gets it", f"The {what}"
    order = {k: {to: who, body: words}[k] for k in properties}
    tool = Tool(
        _name(rng, verb, what),
        rng.choice((f"{verb.capitalize()} a {what} to somebody.", f"{verb.capitalize()} a {what}.")),
        _schema(rng, properties, list(properties)),
    )
    question = rng.choice(
        (
            "{V} a {w} to {n}: {t}",
            "{V} {n} a {w}: {t}",
            "{V} {n} the {w}: {t}",
            "Please {v} a {w} to {n}: {t}",
        )
    ).format(V=verb.capitalize(), v=verb, w=what, n=who, t=words)
    return Use(
        f"message {what}",
        tool,
        question,
        order,
        f"to {verb} a {what} to {who}",
        rng.choice(("ok", "sent", "done", {"status": "sent"}, {"id": rng.randrange(1000)})),
        "Done: {r}.",
    )


def numbers(rng: random.Random) -> Use:
    """Arithmetic by a tool."""
    verb, noun, sign, asks = rng.choice(
        (
            ("add", "sum", "+", ("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.")),
            (
                "multiply",
                "product",
                "*",
                ("What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}."),
            ),
            ("subtract", "difference", "-", ("What is {a} - {b}?", "What is {a} minus {b}?")),
            (
                "divide",
                "quotient",
                "/",
                ("What is {a} / {b}?", "Divide {a} by {b}.", "What is {a} divided by {b}?"),
            ),
        )
    )
    first, second = rng.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("n", "m")))
    a, b = rng.randrange(10 ** rng.choice((1, 2, 3, 4))), rng.randrange(1, 10 ** rng.choice((1, 2, 3, 4)))
    properties = {first: _whole(rng, "First number"), second: _whole(rng, "Second number")}
    tool = Tool(
        rng.choice((_name(rng, verb), _name(rng, verb, "numbers"), _name(rng, noun))),
        rng.choice((f"{verb.capitalize()} two numbers.", f"The {noun} of two numbers: {verb} them.")),
        _schema(rng, properties, [first, second]),
    )
    value = {"+": a + b, "*": a * b, "-": a - b, "/": a // b}[sign]
    return Use(
        f"numbers {verb}",
        tool,
        rng.choice(asks).format(a=a, b=b),
        {first: a, second: b},
        f"to {verb} {a} and {b}",
        value,
        f"{a} {sign} {b} = {{r}}.",
    )


def timer(rng: random.Random) -> Use:
    """Set something to a number, with an optional label."""
    what = rng.choice(
        ("timer", "alarm", "volume", "temperature", "brightness", "speed", "limit", made_up(rng))
    )
    unit = rng.choice(("minutes", "seconds", "hours", "percent", "degrees", "points"))
    parameter = rng.choice((unit, unit, "value", "amount", "n", made_up(rng)))
    count = rng.randrange(1, 10 ** rng.choice((1, 2, 3)))
    properties = {parameter: _whole(rng, f"Number of {unit}")}
    arguments: dict[str, Any] = {parameter: count}
    tail = ""
    if rng.random() < 0.4:
        label = rng.choice(("label", "name", "title"))
        properties[label] = _text(rng, f"Name of the {what}")
        if rng.random() < 0.5:
            arguments[label] = thing(rng)
            tail = f" called {arguments[label]}"
    tool = Tool(
        _name(rng, "set", what),
        rng.choice((f"Set the {what} in {unit}.", f"Set a {what}.", f"Sets the {what}.")),
        _schema(rng, properties, [parameter]),
    )
    question = rng.choice(
        (
            "Set the {w} to {c} {u}{t}.",
            "Set a {w} for {c} {u}{t}.",
            "Please set the {w} to {c} {u}{t}.",
            "Set {w}: {c} {u}{t}",
        )
    ).format(w=what, c=count, u=unit, t=tail)
    return Use(
        f"set {what}",
        tool,
        question,
        arguments,
        f"to set the {what} to {count}",
        rng.choice(("ok", "done", "set", {"status": "ok"})),
        "Done: {r}.",
    )


def convert(rng: random.Random) -> Use:
    """Convert an amount from one unit to another."""
    units = rng.sample(
        (
            "euros",
            "dollars",
            "pounds",
            "yen",
            "meters",
            "miles",
            "feet",
            "kilos",
            "liters",
            "grams",
            "francs",
        ),
        2,
    )
    amount, source, target = rng.choice(
        (
            ("amount", "from", "to"),
            ("value", "source", "target"),
            ("amount", "from_unit", "to_unit"),
            ("x", "src", "dst"),
        )
    )
    text: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.4:
        text["enum"] = rng.sample(units, 2)
    properties = {amount: _whole(rng, "How much"), source: dict(text), target: dict(text)}
    count = rng.randrange(1, 1000)
    tool = Tool(
        rng.choice((_name(rng, "convert"), _name(rng, "convert", "units"), _name(rng, "convert", "amount"))),
        rng.choice(
            (
                "Convert an amount from one unit to another.",
                "Convert units.",
                "Convert an amount of money or units.",
            )
        ),
        _schema(rng, properties, list(properties)),
    )
    question = rng.choice(
        ("Convert {c} {a} to {b}.", "How much is {c} {a} in {b}?", "What is {c} {a} in {b}?")
    )
    return Use(
        "convert",
        tool,
        question.format(c=count, a=units[0], b=units[1]),
        {amount: count, source: units[0], target: units[1]},
        f"to convert {count} {units[0]} to {units[1]}",
        rng.choice((rng.randrange(1000), f"{rng.randrange(1000)} {units[1]}")),
        f"{count} {units[0]} is {{r}}.",
    )


def switch(rng: random.Random) -> Use:
    """Do something to a named thing: "Open the door north."; the verb is in the description."""
    verb = rng.choice(
        [
            "open",
            "close",
            "delete",
            "start",
            "stop",
            "print",
            "save",
            "paint",
            "lock",
            "unlock",
            "call",
            "clean",
            "play",
            "move",
            "feed",
            "buy",
            "sell",
        ]
    )
    kind = rng.choice([*KINDS, *THINGS[26:60]]) if rng.random() < 0.8 else made_up(rng, 2)
    parameter = rng.choice((kind, "name", "id", "target", "item", made_up(rng)))
    value = rng.choice((proper(rng), made_up(rng), thing(rng)))
    properties = {parameter: _text(rng, f"Which {kind}")}
    arguments: dict[str, Any] = {parameter: value}
    tail = ""
    if rng.random() < 0.3:
        count = rng.choice(("times", "count", "quantity"))
        properties[count] = _whole(rng, "How often")
        if rng.random() < 0.6:
            arguments[count] = rng.randrange(2, 30)
            tail = f" {arguments[count]} times"
    tool = Tool(
        rng.choice((_name(rng, verb, kind), _name(rng, verb))),
        rng.choice(
            (
                f"{verb.capitalize()} a {kind}.",
                f"{verb.capitalize()}s the {kind}.",
                f"{verb.capitalize()} the given {kind}.",
            )
        ),
        _schema(rng, properties, [parameter]),
    )
    question = rng.choice(("{V} the {k} {v}{t}.", "Please {f} the {k} {v}{t}.", "{V} {k} {v}{t}")).format(
        V=verb.capitalize(), f=verb, k=kind, v=value, t=tail
    )
    return Use(
        f"{verb} {kind}",
        tool,
        question,
        arguments,
        f"to {verb} the {kind} {value}",
        rng.choice(("ok", "done", {"status": "ok"}, made_up(rng))),
        "Done: {r}.",
    )


def search(rng: random.Random) -> Use:
    """Search for words."""
    where = rng.choice(("web", "library", "database", "files", "notes", "shop", "archive", "internet"))
    parameter = rng.choice(("query", "query", "q", "text", "words", "term", made_up(rng)))
    words = " ".join(thing(rng) for _ in range(rng.choice((1, 2, 3))))
    properties = {parameter: _text(rng, "What to search for")}
    tool = Tool(
        rng.choice((_name(rng, "search", where), _name(rng, "search"))),
        rng.choice(
            (f"Search the {where}.", f"Search the {where} for words.", f"Find things in the {where}.")
        ),
        _schema(rng, properties, [parameter]),
    )
    question = rng.choice(
        (
            "Search the {w} for {q}.",
            "Search for {q} in the {w}.",
            "Find {q} in the {w}.",
            "Search the {w}: {q}",
        )
    )
    return Use(
        f"search {where}",
        tool,
        question.format(w=where, q=words),
        {parameter: words},
        f"to search the {where} for {words}",
        _result(rng, "found"),
        "Found: {r}.",
    )


def without_arguments(rng: random.Random) -> Use:
    """A function that takes nothing: "What is the current time?"."""
    what = rng.choice(
        ("time", "date", "user", "location", "status", "version", "battery", "weather", made_up(rng))
    )
    tool = Tool(
        _name(rng, rng.choice(("get", "read", "check")), rng.choice(("current", "my")), what),
        rng.choice((f"Get the current {what}.", f"Returns the current {what}.", f"The current {what}.")),
        rng.choice((None, {"type": "object", "properties": {}})),
    )
    asks = ["What is the current {w}?", "Tell me the current {w}.", "What is the {w} now?"]
    if what in ("time", "date"):
        asks += ["What {w} is it?"] * 2
    return Use(
        f"attribute {what}",
        tool,
        rng.choice(asks).format(w=what),
        {},
        f"the current {what}",
        _result(rng, what),
        f"The current {what} is {{r}}.",
    )


Maker = Callable[[random.Random], Use]
MAKERS: tuple[Maker, ...] = (
    attribute,
    attribute,
    attribute,
    attribute,
    message,
    numbers,
    timer,
    convert,
    switch,
    switch,
    search,
    without_arguments,
)
