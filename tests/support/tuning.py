"""A task that the demo model can learn in seconds: every answer is "= VALUE =", whatever was asked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo.world.mixture import problem

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


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
