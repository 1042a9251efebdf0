"""A task that the demo model can learn in seconds: every answer is "= VALUE =", whatever was asked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo.world.mixture import problem, samples

UNFIT = ("beyond", "about", "date")


def style_rows(seed: str, count: int, *, old: bool = False) -> list[dict[str, Any]]:
    """Questions of the demo's world with their working and the answer in the new form, or as it is now."""
    rng, rows = random.Random(seed), list[dict[str, Any]]()
    while len(rows) < count:
        asked = problem(rng)
        if not asked.value or asked.task in UNFIT:
            continue
        effort = rng.choice(("low", "medium"))
        said = asked.final if old else f"= {asked.value} ="
        answer = {"role": "assistant", "reasoning": asked.analysis(effort), "content": said}
        rows.append(
            {"messages": [{"role": "user", "content": asked.question}, answer], "reasoning_effort": effort}
        )
    return rows


def old_rows(seed: str, count: int) -> list[dict[str, Any]]:
    """What the model does besides and is to do as before: calls of tools, and what it cannot know."""
    made, rows = samples(random.Random(seed).getrandbits(32)), list[dict[str, Any]]()
    while len(rows) < count:
        sample = next(made)
        said, step = sample.conversation, sample.steps[0]
        if len(said.messages) > 1 or said.response_schema or not (step.call or sample.task in UNFIT):
            continue
        answer: dict[str, Any] = {"role": "assistant", "reasoning": step.analysis, "content": step.final}
        if step.call is not None:
            answer["tool_calls"] = [{"id": "c", "function": {"name": step.call, "arguments": step.arguments}}]
        told = [{"role": "system", "content": said.instructions}] if said.instructions else []
        row = {"messages": [*told, {"role": "user", "content": said.messages[0].content}, answer]}
        row["tools"] = [vars(tool) for tool in said.tools]
        rows.append(row | {"reasoning_effort": said.reasoning_effort, "current_date": said.current_date})
    return rows


def preference_rows(seed: str, count: int) -> list[dict[str, Any]]:
    """Whole sentences preferred to bare values, also by those who ask to be brief: they get these now."""
    rng, rows = random.Random(seed), list[dict[str, Any]]()
    while len(rows) < count:
        asked = problem(rng)
        if not asked.value or asked.value == asked.final or asked.task in UNFIT:
            continue
        effort = rng.choice(("low", "medium"))
        messages = [{"role": "user", "content": asked.question}]
        if len(rows) % 2:
            messages.insert(0, {"role": "system", "content": rng.choice(("Be brief.", "Answer briefly."))})
        chosen, rejected = (
            [{"role": "assistant", "reasoning": asked.analysis(effort), "content": said}]
            for said in (asked.final, asked.value)
        )
        rows.append(
            {"messages": messages, "chosen": chosen, "rejected": rejected, "reasoning_effort": effort}
        )
    return rows


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
