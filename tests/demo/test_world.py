"""The generator of the demo model's training data: what it says is true, and it is exactly harmony."""

from __future__ import annotations

import json
import random
import re

import pytest

pytest.importorskip("demo.world.mixture")
from demo.world import arithmetic
from demo.world.corpus import segments
from demo.world.mixture import sample, samples
from demo.world.sample import Sample
from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.harmony import Diagnostic, Message, StreamParser, render
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.constraints import constrain


def many(count: int, seed: int = 7) -> list[Sample]:
    rng = random.Random(seed)
    return [sample(rng) for _ in range(count)]


def test_equal_seeds_give_equal_conversations() -> None:
    first, second = samples(3), samples(3)
    assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]


@pytest.mark.parametrize("op", ["+", "-", "*"])
def test_the_workings_of_sums_are_true(op: str) -> None:
    rng = random.Random(op)
    for _ in range(500):
        problem = arithmetic.calculation(rng, op)
        a, b, value = (int(x) for x in re.findall(r"-?\d+", problem.final.replace(" - ", " ")))
        assert value == {"+": a + b, "-": a - b, "*": a * b}[op]
        working = f"{problem.short} {problem.check}"
        for x, y, carry, total in re.findall(r"(?<!\d)(\d)\+(\d)\+(\d)=(\d\d)", working):
            assert int(x) + int(y) + int(carry) == int(total)
        for x, y, borrow, rest in re.findall(r"(?<!\d)(\d\d)-(\d)-(\d)=(\d)", working):
            assert int(x) - int(y) - int(borrow) == int(rest)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO_FOLDER)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which special tokens are spelled out."""
    ids_of = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}
    return [
        i
        for part in re.split(r"(<\|[a-z]+\|>)", text)
        for i in ([ids_of[part]] if part in ids_of else tokenizer.encode(part))
    ]


def test_calls_name_a_declared_tool_and_meet_its_schema() -> None:
    calls = [(s, step) for s in many(150) for step in s.steps if step.call is not None]
    assert len(calls) > 20
    for made, step in calls:
        (tool,) = [t for t in made.conversation.tools if t.name == step.call]
        parameters = tool.parameters or {}
        arguments, properties = json.loads(step.arguments), parameters.get("properties", {})
        assert set(parameters.get("required", [])) <= set(arguments) <= set(properties)
        for name, value in arguments.items():
            assert isinstance(value, str if properties[name]["type"] == "string" else int)
            assert value in properties[name].get("enum", [value])


def test_a_grammar_lets_the_expected_replies_through(tokenizer: Tokenizer) -> None:
    for made in many(60):
        conversation, step = made.conversation, made.steps[0]
        constraint = constrain(
            tokenizer, tools=conversation.tools, schema=conversation.response_schema, tool_choice="auto"
        )
        for token in encode(tokenizer, step.text()) if constraint else []:
            assert constraint is not None
            mask = constraint.allowed()
            assert mask is None or mask[token // 32] >> (token % 32) & 1, (
                step.text(),
                tokenizer.decode([token]),
            )
            constraint.accept(token)


def test_what_is_learned_parses_without_a_diagnostic(tokenizer: Tokenizer) -> None:
    for made in many(100):
        for step in made.steps:
            parser = StreamParser(tokenizer)
            ids = encode(tokenizer, step.text())
            events = [e for i in ids for e in parser.push(i)] + parser.finish()
            assert not [e for e in events if isinstance(e, Diagnostic)]
            assert parser.messages[-1].content == (step.final if step.call is None else step.arguments)


def test_a_tool_loop_is_laid_out_as_the_renderer_lays_it_out(tokenizer: Tokenizer) -> None:
    made = next(s for s in many(300) if s.task == "tool" and len(s.steps) == 2)
    as_sampled = random.Random(1)
    as_sampled.random = lambda: 0.9  # type: ignore[method-assign]
    pieces = [encode(tokenizer, text) for text, _ in segments(made, as_sampled)]
    sampled, step = pieces[1], made.steps[0]
    cut = sampled.index(tokenizer.special.end) + 1
    second = sampled[cut + len(encode(tokenizer, "<|start|>assistant")) :]
    call = f"functions.{step.call}"
    made.conversation.messages += [
        Message("assistant", step.analysis, "analysis", token_ids=tuple(sampled[:cut])),
        Message("assistant", step.arguments, "commentary", call, token_ids=tuple(second)),
        Message.tool_result(step.result or "", name=call),
    ]
    assert render(made.conversation, tokenizer) == pieces[0] + pieces[1] + pieces[2]
