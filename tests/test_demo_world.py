"""The generator of the demo model's training data: what it says is true, and it is exactly harmony."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pytest.importorskip("demo_world.world")
from demo_world import arithmetic
from demo_world.corpus import segments
from demo_world.sample import Sample
from demo_world.world import sample, samples

from mlx_gptoss.grammar import compile_constraint
from mlx_gptoss.harmony import Message, StreamParser, render
from mlx_gptoss.hub import DEMO_FOLDER
from mlx_gptoss.tokenizer import Tokenizer


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


def test_calls_name_a_declared_tool_and_meet_its_schema() -> None:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    seen = 0
    for made in many(150):
        step = made.steps[0]
        if step.call is None:
            continue
        seen += 1
        (tool,) = [t for t in made.conversation.tools if t.name == step.call]
        arguments = json.loads(step.arguments)
        properties = (tool.parameters or {}).get("properties", {})
        assert set((tool.parameters or {}).get("required", [])) <= set(arguments) <= set(properties)
        constraint = compile_constraint(tokenizer, tools=made.conversation.tools, tool_choice="required")
        assert constraint is not None
        del constraint
        for name, value in arguments.items():
            kind = properties[name]["type"]
            assert isinstance(value, str if kind == "string" else int)
            assert value in properties[name].get("enum", [value])
    assert seen > 20


def test_what_is_learned_parses_without_a_diagnostic() -> None:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    specials = re.compile(r"(<\|[a-z]+\|>)")
    ids_of = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}
    for made in many(100):
        for step in made.steps:
            parser = StreamParser(tokenizer)
            ids: list[int] = []
            for part in specials.split(step.text()):
                ids += [ids_of[part]] if part in ids_of else tokenizer.encode(part)
            events = [e for i in ids for e in parser.push(i)] + parser.finish()
            assert not [e for e in events if type(e).__name__ == "Diagnostic"]
            last = parser.messages[-1]
            assert last.content == (step.final if step.call is None else step.arguments)


def test_a_tool_loop_is_laid_out_as_the_renderer_lays_it_out() -> None:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    specials = re.compile(r"(<\|[a-z]+\|>)")
    ids_of = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}

    def encode(text: str) -> list[int]:
        return [
            t for p in specials.split(text) for t in ([ids_of[p]] if p in ids_of else tokenizer.encode(p))
        ]

    rng = random.Random(1)
    made = next(s for s in many(300) if s.task == "tool" and len(s.steps) == 2)
    rng.random = lambda: 0.9  # type: ignore[method-assign]  # the history as it was sampled
    pieces = segments(made, rng)
    sampled, step = encode(pieces[1][0]), made.steps[0]
    cut = sampled.index(ids_of["<|end|>"]) + 1
    header = len(encode("<|start|>assistant"))
    conversation = made.conversation
    conversation.messages = [
        *conversation.messages,
        Message("assistant", step.analysis, "analysis", token_ids=tuple(sampled[:cut])),
        Message(
            "assistant", step.arguments, "commentary", f"functions.{step.call}",
            token_ids=tuple(sampled[cut + header :]),
        ),
        Message.tool_result(step.result or "", name=f"functions.{step.call}"),
    ]  # fmt: skip
    assert render(conversation, tokenizer) == encode("".join(t for t, _ in pieces[:3]))
