"""Constrained sampling from a model that knows nothing: is every reply valid, and what does a mask cost?

    python -m benchmarks.constrained [--samples 10000] [--tokenizer FOLDER] [--masks]

Random logits go through the same constraint and the same sampler as a real model's, at temperature 1.5. Each
sample is a whole turn: headers, some reasoning, then an answer that follows a JSON schema or a call whose
arguments do; every one is read back with a plain reader of its own and checked by `jsonschema`. Without
--tokenizer the vocabulary is the tests' (bytes and a few words). --masks prints the time of a mask instead.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np

from mlx_gptoss.engine.sampler import Sampler, unpack_bits
from mlx_gptoss.harmony import Tool
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.constraints import constrain

TEMPERATURE = 1.5
MAX_TOKENS = 3000


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


STRING, INTEGER, NUMBER, BOOLEAN = ({"type": t} for t in ("string", "integer", "number", "boolean"))

SCHEMAS: dict[str, dict[str, Any]] = {
    "empty object": _object(),
    "flat object": _object("name", "age", name=STRING, age=INTEGER),
    "optional keys": _object("b", a=STRING, b=INTEGER, c=BOOLEAN, d=NUMBER),
    "open object": {"type": "object", "properties": {"id": INTEGER}, "required": ["id"]},
    "map of numbers": {"type": "object", "additionalProperties": NUMBER},
    "typed extra keys": {"type": "object", "properties": {"a": STRING}, "additionalProperties": INTEGER},
    "pattern keys": {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,4}$": BOOLEAN},
        "additionalProperties": False,
    },
    "nested objects": _object("o", o=_object("p", p=_object("q", q=BOOLEAN))),
    "enum of texts": {"enum": ["red", "green", "blue"]},
    "enum of all kinds": {"enum": [1, "one", None, True, [1, 2], {"a": 1}]},
    "const": _object("kind", kind={"const": "event"}),
    "null": {"type": "null"},
    "type list": _object("v", v={"type": ["string", "null", "integer"]}),
    "anyOf": {"anyOf": [INTEGER, _object("s", s=STRING), {"type": "array", "items": BOOLEAN}]},
    "oneOf, told apart": {
        "oneOf": [
            _object("t", "r", t={"const": "circle"}, r=NUMBER),
            _object("t", "w", t={"const": "square"}, w=NUMBER),
        ]
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": BOOLEAN}, "required": ["b"]},
        ]
    },
    "local $ref": {
        "$defs": {"point": _object("x", "y", x=NUMBER, y=NUMBER)},
        **_object("from", "to", **{"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "linked list": {
        "$defs": {
            "node": _object(
                "value", value=INTEGER, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
            )
        },
        "$ref": "#/$defs/node",
    },
    "tree": {
        "$defs": {
            "tree": _object(
                "v", v=BOOLEAN, kids={"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/tree"}}
            )
        },
        "$ref": "#/$defs/tree",
    },
    "array of integers": {"type": "array", "items": INTEGER},
    "array of 2 to 4": {"type": "array", "items": STRING, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING, BOOLEAN], "items": False, "minItems": 3},
    "array of objects": {"type": "array", "items": _object("k", k=STRING), "maxItems": 5},
    "bounded text": {"type": "string", "minLength": 3, "maxLength": 8},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "unanchored pattern": {"type": "string", "pattern": "[aeiou]{2}", "maxLength": 40},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "bounded integer": {"type": "integer", "minimum": -7, "maximum": 250},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multipleOf": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "unicode keys": _object("größe", "日本", größe=INTEGER, 日本={"enum": ["é", "🙂"]}),
    "quotes in keys": _object('a"b\\c', **{'a"b\\c': BOOLEAN}),
    "anything": {},
    "deep": _object("a", a={"type": "array", "items": {"type": "array", "items": _object("n", n=NUMBER)}}),
    "person": _object(
        "name",
        "email",
        "tags",
        name={"type": "string", "minLength": 1, "description": "full name"},
        email={"type": "string", "format": "email"},
        tags={"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        address={"anyOf": [_object("city", city=STRING), {"type": "null"}], "default": None},
    ),
}
_MESSAGE = re.compile(
    r"(?:<\|start\|>assistant)?(?: to=(?P<before>\S+?))?"
    r"<\|channel\|>(?P<channel>\w+)(?: to=(?P<after>[^\s<]+))?"
    r"(?: ?<\|constrain\|>\w+| \w+)?<\|message\|>(?P<body>.*?)(?P<end><\|end\|>|<\|call\|>|<\|return\|>)",
    re.DOTALL,
)
_FORMATS = jsonschema.FormatChecker()


@dataclass
class Turn:
    """One sampled turn, read back. text: all of it, markup spelled out. cut: MAX_TOKENS came first."""

    text: str
    tokens: int
    cut: bool
    messages: list[dict[str, str | None]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, str | None]:
        """Channel, recipient, body and end token of the last message."""
        return self.messages[-1]


class RandomModel:
    """A next-token distribution that depends on nothing: normal logits, drawn anew for every token.

    What closes a text, a list or an object is made likelier, or a number or a text would go on for thousands
    of tokens before chance ends it.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._random = np.random.default_rng(seed)
        closing = np.zeros(tokenizer.vocab_size, np.float32)
        for token_id in range(tokenizer.vocab_size):
            data = tokenizer.token_bytes(token_id)
            if tokenizer.is_special(token_id) or data[:1] in (b'"', b"}", b"]"):
                closing[token_id] = 4.0
        if tokenizer.vocab_size > 10_000:  # closing tokens are as rare there as the vocabulary is large
            closing *= 2.0
        self._closing = closing

    def logits(self) -> mx.array:
        return mx.array(self._random.standard_normal(self._vocab_size, np.float32) * 2.0 + self._closing)


def sample_turn(tokenizer: Tokenizer, constraint: Any, seed: int, *, whole: bool = True) -> Turn:
    """Sample until a stop token (or MAX_TOKENS) and read the turn back; see `read_turn`."""
    model = RandomModel(tokenizer, seed)
    sampler = Sampler(
        SamplingParams(temperature=TEMPERATURE, seed=seed), tokenizer.vocab_size, np.zeros(0, np.int64)
    )
    tokens: list[int] = []
    while len(tokens) < MAX_TOKENS and (not tokens or tokens[-1] not in tokenizer.stop_ids):
        token = int(np.array(sampler.sample(model.logits(), constraint.allowed()))[0])
        constraint.accept(token)
        tokens.append(token)
    return read_turn(tokenizer.decode(tokens), len(tokens), tokens[-1] not in tokenizer.stop_ids, whole)


def read_turn(text: str, tokens: int, cut: bool, whole: bool) -> Turn:
    """Split a turn into messages; `whole` raises ValueError where anything stands between them."""
    turn, at = Turn(text, tokens, cut), 0
    while at < len(text) and not cut:
        found = _MESSAGE.match(text, at) if whole else _MESSAGE.search(text, at)
        if found is None:
            if not whole:
                break
            raise ValueError(f"no message at {at}: {text[at : at + 200]!r}")
        recipient = found["after"] or found["before"]
        turn.messages.append(
            {"channel": found["channel"], "recipient": recipient, "body": found["body"], "end": found["end"]}
        )
        at = found.end()
    return turn


def check(body: str | None, schema: dict[str, Any]) -> None:
    """Raise where a text is not JSON that satisfies the schema."""
    jsonschema.Draft202012Validator(schema, format_checker=_FORMATS).validate(json.loads(body or ""))


def one_sample(tokenizer: Tokenizer, number: int) -> tuple[Turn, str]:
    """Sample number `number` (its seed), checked: an answer or a call, by turns of schema and tool_choice.

    Returns the turn and the schema's name. Raises where the reply is not what was asked for.
    """
    pick = random.Random(number)
    names = list(SCHEMAS)
    name = names[number % len(names)]
    budget = pick.randrange(12)
    if pick.random() < 0.6 or SCHEMAS[name].get("type") != "object":
        constraint = constrain(tokenizer, schema=SCHEMAS[name], reasoning_budget=budget)
        turn = sample_turn(tokenizer, constraint, number)
        if not turn.cut:
            if (turn.last["channel"], turn.last["end"]) != ("final", "<|return|>"):
                raise ValueError(f"the turn does not end with an answer: {turn.last}")
            check(turn.last["body"], SCHEMAS[name])
        return turn, name
    declared = {f"tool_{i}": SCHEMAS[n] for i, n in enumerate(names) if SCHEMAS[n].get("type") == "object"}
    declared = dict(pick.sample(sorted(declared.items()), 3)) | {"the_tool": SCHEMAS[name]}
    choice: Any = pick.choice(["auto", "required", ("named", "the_tool")])
    constraint = constrain(
        tokenizer,
        tools=[Tool(n, parameters=s) for n, s in declared.items()],
        tool_choice=choice,
        reasoning_budget=budget,
    )
    # Free answers and reasoning may end anyhow; every call in them must still be right.
    turn = sample_turn(tokenizer, constraint, number, whole=choice != "auto")
    for message in turn.messages:
        recipient = message["recipient"]
        if recipient is not None:
            if message["end"] != "<|call|>":
                raise ValueError(f"a call that does not end: {message}")
            check(message["body"], declared[recipient.removeprefix("functions.")])
    if not turn.cut and choice != "auto" and turn.last["recipient"] is None:
        raise ValueError(f"tool_choice was {choice} and no tool is called: {turn.text!r:.300}")
    if not turn.cut and isinstance(choice, tuple) and turn.last["recipient"] != "functions.the_tool":
        raise ValueError(f"another tool than the one named is called: {turn.last}")
    return turn, name


def time_masks(tokenizer: Tokenizer, samples: int = 10) -> dict[str, list[float]]:
    """Microseconds of processor time per token, by part: what the constraint takes (`allowed` and `accept`)
    in headers, reasoning and answers, and what handing a mask to MLX takes. Over sampled turns, whose texts
    are wilder than a real model's, and over a plain answer ("ordinary json")."""
    times: dict[str, list[float]] = {
        "header": [], "reasoning": [], "answer": [], "ordinary json": [], "to MLX": []
    }  # fmt: skip
    for number in range(samples):
        schema = SCHEMAS[list(SCHEMAS)[number % len(SCHEMAS)]]
        constraint = constrain(tokenizer, schema=schema, reasoning_budget=8)
        assert constraint is not None
        model = RandomModel(tokenizer, number)
        sampler = Sampler(
            SamplingParams(temperature=TEMPERATURE), tokenizer.vocab_size, np.zeros(0, np.int64)
        )
        region = "header"
        for _ in range(60):
            began = time.thread_time()
            allowed = constraint.allowed()
            spent = time.thread_time() - began
            token = int(np.array(sampler.sample(model.logits(), allowed))[0])
            began = time.thread_time()
            constraint.accept(token)
            times[region].append((spent + time.thread_time() - began) * 1e6)
            if token in tokenizer.stop_ids:
                break
            if token == tokenizer.special.message:
                region = "answer" if constraint.in_answer else "reasoning"
            elif token == tokenizer.special.end:
                region = "header"
    people = json.dumps([{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "poetry"]}] * 8)
    for _ in range(3):
        constraint = constrain(tokenizer, schema={"type": "array"}, reasoning_budget=0)
        assert constraint is not None
        special = tokenizer.special
        head = [special.channel, *tokenizer.encode("final"), special.message]
        for i, token in enumerate([*head, *tokenizer.encode(people)]):
            began = time.thread_time()
            allowed = constraint.allowed()
            constraint.accept(token)
            middle = time.thread_time()
            if i >= len(head) and allowed is not None:
                times["ordinary json"].append((middle - began) * 1e6)
                mx.eval(unpack_bits(allowed, tokenizer.vocab_size))
                times["to MLX"].append((time.thread_time() - middle) * 1e6)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("--masks", action="store_true", help="time the masks instead")
    options = parser.parse_args()
    if options.tokenizer:
        tokenizer = Tokenizer.from_folder(options.tokenizer)
    else:
        from tests.support.byte_tokenizer import byte_tokenizer

        tokenizer = byte_tokenizer(tempfile.mkdtemp())
    if options.masks:
        for region, times in time_masks(tokenizer).items():
            if times:
                p50, p95 = np.percentile(times, [50, 95])
                print(f"{region:14s} {len(times):6d} tokens: median {p50:7.1f} us, p95 {p95:7.1f} us")
        return 0
    invalid = cut = tokens = 0
    began = time.perf_counter()
    for number in range(options.samples):
        try:
            turn, _ = one_sample(tokenizer, number)
        except Exception as error:  # every kind of failure counts as an invalid sample and is shown
            invalid += 1
            print(f"sample {number}: {type(error).__name__}: {error}"[:500])
            continue
        cut += turn.cut
        tokens += turn.tokens
    print(
        f"{options.samples} samples over {len(SCHEMAS)} schemas, {tokens} tokens, vocabulary "
        f"{tokenizer.vocab_size}: {invalid} invalid, {cut} cut at {MAX_TOKENS} tokens, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 1 if invalid else 0


if __name__ == "__main__":
    sys.exit(main())
