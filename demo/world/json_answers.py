"""Answers as JSON, after a schema in the developer message."""

from __future__ import annotations

import json
import random
from typing import Any

from demo.world.sample import Problem, Sample, Step
from demo.world.words import CAPITALS, JOBS, NAMES, PETS, THINGS, made_up, proper, thing
from mlx_gptoss.harmony.types import Conversation, Message, ReasoningEffort

_TYPE = {int: "integer", str: "string", bool: "boolean"}


def _type(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"items": {"type": _TYPE[type(value[0])]}, "type": "array"}
    return {"type": _TYPE[type(value)]}


def schema_of(rng: random.Random, data: dict[str, Any]) -> dict[str, Any]:
    """A schema that `data` meets: bare, strict, or with titles and in the order that pydantic has."""
    if rng.random() < 0.45:
        properties = {
            k: {"items": _type(v)["items"], "title": k.replace("_", " ").title(), "type": "array"}
            if isinstance(v, list)
            else {"title": k.replace("_", " ").title(), **_type(v)}
            for k, v in data.items()
        }
        title = rng.choice(
            ("Answer", "Result", "Reply", made_up(rng).capitalize(), *[k.capitalize() for k in data])
        )
        return {"properties": properties, "required": list(data), "title": title, "type": "object"}
    properties = {k: _type(v) for k, v in data.items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": list(data)}
    if rng.random() < 0.4:
        schema["additionalProperties"] = False
    return schema


def _sample(
    rng: random.Random, task: str, question: str, analysis: str, data: dict[str, Any], effort: ReasoningEffort
) -> Sample:
    conversation = Conversation(
        [Message.user(question)],
        reasoning_effort=effort,
        response_schema=schema_of(rng, data),
        response_name=rng.choice(("response", "response", "response", "answer", "result", made_up(rng))),
    )
    final = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return Sample(task, conversation, [Step(f"{analysis} JSON: {', '.join(data)}.".lstrip(), final)])


def problem_as_json(rng: random.Random, problem: Problem, effort: ReasoningEffort) -> Sample:
    """The answer to a problem under one key, which may be made up."""
    key = rng.choice(problem.keys) if rng.random() < 0.85 else made_up(rng, 2)
    return _sample(rng, "json", problem.question, problem.analysis(effort), {key: problem.data}, effort)


def person(rng: random.Random, effort: ReasoningEffort) -> Sample:
    """Facts out of a sentence, for the keys that the schema asks for."""
    values: dict[str, Any] = {
        "name": rng.choice(NAMES) if rng.random() < 0.7 else made_up(rng).capitalize(),
        "age": rng.randrange(100),
        "city": rng.choice(list(CAPITALS.values())) if rng.random() < 0.7 else proper(rng),
        "job": rng.choice(JOBS),
        "pet": rng.choice(PETS),
    }
    phrases = {
        "age": "is {age} years old",
        "city": rng.choice(("lives in {city}", "is from {city}")),
        "job": rng.choice(("works as a {job}", "is a {job}")),
        "pet": "has a {pet}",
    }
    told = rng.sample(list(phrases), rng.choice((2, 2, 3, 4)))
    parts = [phrases[k].format(**values) for k in told]
    sentence = f"{values['name']} {', '.join(parts[:-1])} and {parts[-1]}."
    prefix = rng.choice(("", "", "Extract: ", "Who is this? ", "Extract the person: "))
    keys = rng.sample(["name", *told], rng.randrange(1, len(told) + 2))
    if rng.random() < 0.8:
        keys = [k for k in ("name", *phrases) if k in keys]
    data = {k: values[k] for k in keys}
    listed = " ".join(f"{k}={v}" for k, v in data.items())
    lead = {"low": ""}.get(effort, f"Read about {values['name']}. ")
    return _sample(rng, "json", prefix + sentence, f"{lead}{listed}.", data, effort)


def city_and_country(rng: random.Random, effort: ReasoningEffort) -> Sample:
    """Two keys out of one question on a capital."""
    country, city = rng.choice(list(CAPITALS.items()))
    pairs = [("country", country), ("capital" if rng.random() < 0.7 else "city", city)]
    if rng.random() < 0.3:
        pairs.reverse()
    question = rng.choice(
        (f"What is the capital of {country}?", f"The capital of {country}?", f"Capital of {country}")
    )
    lead = {"low": ""}.get(effort, f"The capital of {country}? ")
    return _sample(rng, "json", question, f"{lead}{country}: {city}.", dict(pairs), effort)


def shopping(rng: random.Random, effort: ReasoningEffort) -> Sample:
    """A list of items out of a sentence."""
    items: list[str] = []
    while len(items) < rng.choice((2, 3, 3, 4)):
        item = rng.choice(THINGS) if rng.random() < 0.8 else thing(rng)
        if item not in items:
            items.append(item)
    text = f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]
    question = rng.choice(("Buy {t}.", "I need {t}.", "List: {t}", "We have {t}.")).format(t=text)
    key = rng.choice(("items", "items", "things", "list", "names", made_up(rng)))
    return _sample(rng, "json", question, f"{', '.join(items)}.", {key: items}, effort)
