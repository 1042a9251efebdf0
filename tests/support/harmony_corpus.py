"""A seeded corpus of conversations for tests of the chat format.

Everything is drawn from `random.Random(seed)`, so that a failure names the seed that shows it again.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from mlx_gptoss.harmony import BROWSER, PYTHON, Conversation, Message, Tool

WORDS = [
    *("weather", "Paris", "invoice", "the", "of", "and", "12", "3.5", "naïve", "Zürich", "東京", "天気"),
    *("données", "Ελλάδα", "привет", "мир", "مرحبا", "שלום", "हिन्दी", "ไทย", "한국어", "😀", "👩🏽‍🚀", "🇨🇭"),
    *(
        "e\u0301",
        "ﬁne",
        "\u200b",
        "\u00a0",
        "𝔘𝔫𝔦",
        "\U0001f9d1\u200d\U0001f4bb",
        "\ufeff",
        "\u2028",
        "\x00",
        "\x7f",
    ),
    *("<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|channel|>final", "to=functions.x", "{{", "%s"),
    *("don't", "I'LL", "{}", "[]", '"quoted"', "\\n", "//", "/* */", "A|B", "`code`", "$1,000.00"),
    *("https://a.example/b?c=d&e=%20", "snake_case", "CamelCase", "ÀÉÎ", "ǅ", "1234567890", "½", "Ⅷ"),
]
BREAKS = (" ", " ", " ", " ", "  ", "\n", "\n\n", "\t", ", ", ". ", "", "\r\n", ":\n  - ")
NAMES = ("get_weather", "search", "lookup-v2", "Add", "file.read", "run_sql", "a", "send_mail_to_all_users")
KEYS = ("city", "unit", "from", "q", "max_results", "Größe", "nested", "items", "when", "x1")


def text(rng: Random, most: int = 30) -> str:
    """Words of many scripts, with awkward white space and spelled-out markup."""
    return "".join(rng.choice(WORDS) + rng.choice(BREAKS) for _ in range(rng.randint(0, most)))


def line(rng: Random, most: int = 12) -> str:
    """Text on one line."""
    return " ".join(text(rng, most).split()) or "x"


def value(rng: Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 0:
        return rng.choice([0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**63) - 1, 10**25])
    if kind == 1:
        return rng.choice(
            [0.0, -0.0, 0.1, 1e16, 1e15, 1e-5, 1e-6, 1.5e300, 123456.789, 1e22, -2.5e-9, 5e-324]
        )
    if kind in (2, 3):
        return rng.choice([line(rng), text(rng, 4), "", 'a"b', "back\\slash", "\x01\x7f"])
    if kind in (4, 5):
        return rng.choice([True, False, None])
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(KEYS): value(rng, depth - 1) for _ in range(rng.randint(0, 3))}


def schema(rng: Random, depth: int = 3) -> dict[str, Any]:
    """A schema from the ground that openai-harmony covers."""
    kind = rng.randrange(9 if depth else 5)
    out: dict[str, Any] = {}
    if kind < 3:
        out["type"] = rng.choice(["string", "number", "integer", "boolean", "string"])
        if out["type"] == "string" and rng.random() < 0.4:
            out["enum"] = [line(rng, 2) for _ in range(rng.randint(1, 4))]
    elif kind == 3:
        types = ["string", "number", "integer", "null", "boolean"]
        out["type"] = rng.sample(types, rng.randint(1, 3))
    elif kind == 4:
        out = rng.choice([{}, {"type": "array"}, {"type": "object"}])
        out = dict(out)
    elif kind == 5:
        out = {"type": "array", "items": schema(rng, depth - 1)}
    elif kind == 6:
        out = {"oneOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    else:
        out = object_schema(rng, depth - 1)
    return {**out, **notes(rng)}


def notes(rng: Random) -> dict[str, Any]:
    """Annotations and limits, which do not change the shape."""
    out: dict[str, Any] = {}
    if rng.random() < 0.5:
        out["description"] = rng.choice([line(rng), text(rng), ""])
    if rng.random() < 0.15:
        out["title"] = line(rng, 3)
    if rng.random() < 0.25:
        out["default"] = value(rng)
    if rng.random() < 0.15:
        out["nullable"] = rng.random() < 0.8
    if rng.random() < 0.15:
        out["examples"] = [value(rng) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.1:
        out.update({"minimum": 0, "pattern": "^a", "format": "date", "additionalProperties": False, "x-y": 1})
    return out


def object_schema(rng: Random, depth: int = 3) -> dict[str, Any]:
    """An object with properties, some of them required."""
    keys = rng.sample(KEYS, rng.randint(0, 4))
    out = {"type": "object", "properties": {k: schema(rng, depth) for k in keys}}
    if rng.random() < 0.7:
        out["required"] = rng.sample(keys, rng.randint(0, len(keys)))
    return out


def tools(rng: Random) -> list[Tool]:
    """Function tools with and without arguments."""
    names = rng.sample(NAMES, rng.choice([0, 0, 1, 1, 2, 4]))
    kinds = [None, object_schema(rng), object_schema(rng), {}, schema(rng)]
    return [Tool(name, rng.choice([text(rng), line(rng), ""]), rng.choice(kinds)) for name in names]


def turn(rng: Random, names: list[str]) -> list[Message]:
    """A user's message and what the assistant makes of it, with loops of tool calls."""
    name = rng.choice([None, None, None, "alice"])
    out = [Message("user", text(rng), name=name)]
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        if rng.random() < 0.7:
            out.append(Message.reasoning(text(rng)))
        if rng.random() < 0.3:
            out.append(Message.preamble(text(rng)))
        out += loop_step(rng, names)
    if rng.random() < 0.5:
        out.append(Message.reasoning(text(rng)))
    if rng.random() < 0.8:
        kind = rng.choice([None, None, None, "<|constrain|>json", "json"])
        out.append(Message("assistant", text(rng), channel="final", content_type=kind))
    return out


def loop_step(rng: Random, names: list[str]) -> list[Message]:
    """A call and its result."""
    arguments = json.dumps(value(rng), ensure_ascii=rng.random() < 0.5)
    call_id = f"call_{rng.randrange(10**9)}"
    kind = rng.randrange(4)
    if kind == 0:
        call = Message("assistant", "print(1)", "analysis", "python", None, "code", call_id)
    elif kind == 1:
        call = Message("assistant", arguments, "analysis", "browser.search", None, None, call_id)
    else:
        call = Message.tool_call(rng.choice(names or ["gone"]), arguments, call_id)
    named = {"name": call.recipient} if rng.random() < 0.5 else {"call_id": call_id}
    result = Message.tool_result(text(rng), **named, channel=call.channel or "")
    return [call, result]


def conversation(seed: int) -> Conversation:
    """The conversation of this seed."""
    rng = Random(seed)
    own = tools(rng)
    names = [tool.name for tool in own]
    turns = [turn(rng, names) for _ in range(rng.choice([0, 1, 1, 2, 3, 5]))]
    return Conversation(
        [message for messages in turns for message in messages],
        instructions=rng.choice([None, text(rng), line(rng), ""]),
        tools=own,
        builtin=rng.sample([BROWSER, PYTHON], rng.choice([0, 0, 1, 2])),
        reasoning_effort=rng.choice(["low", "medium", "high", None]),
        current_date=rng.choice([None, "2026-01-31"]),
        knowledge_cutoff=rng.choice(["2024-06", None]),
        identity=rng.choice(["You are ChatGPT, a large language model trained by OpenAI.", line(rng), None]),
    )
