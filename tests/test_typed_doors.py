"""A user's script under a type checker: misspelt keywords and wrong types are refused, replies are typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SCRIPT = """\
import dataclasses
import enum
from typing import Literal, TypedDict

from pydantic import BaseModel

import mlx_gptoss as gptoss


class City(BaseModel):
    name: str


@dataclasses.dataclass
class Point:
    x: int


class Stop(TypedDict):
    at: str


class Colour(enum.Enum):
    RED = "red"


llm = gptoss.load("demo", max_context=4096)
reveal_type(llm.respond("Which?", schema=City, temperature=0.0).parsed)  # City | None
reveal_type(llm.chat(schema=City).send("Which?").parsed)  # City | None
reveal_type(llm.respond("Which?").text)  # str
reveal_type(llm.respond("Which?", schema=Point).parsed)  # Point | None
stop = llm.respond("Which?", schema=Stop).parsed
reveal_type(stop["at"] if stop else "")  # str
reveal_type(llm.respond("Which?", schema=Colour).parsed)  # Colour | None
reveal_type(llm.respond("Which?", schema=list[int]).parsed)  # list[int] | None
reveal_type(llm.respond("Which?", schema=int | None).parsed)  # int | None
scored = llm.respond("Which?", schema=bool, logprobs=1)
reveal_type(scored.logprobs)  # tuple[tuple[int, TokenLogprobs], ...] | None
reveal_type([reply.parsed for _, reply in llm.respond_many(["Which?"], schema=City)])  # list[City | None]
choice = llm.respond("Which?", schema=Literal["a", "b"]).parsed
assert choice is not None
letter: Literal["a", "b"] = choice
llm.respond([gptoss.Message.user("x"), {"role": "user", "content": "x"}], schema={"type": "integer"})
llm.respond("x", temprature=1.0)  # wrong
llm.respond("x", max_tokens="many")  # wrong
llm.chat(instructons="Be brief.")  # wrong
gptoss.load("demo", max_contxt=4096)  # wrong
llm.respond("x", system="Be brief.")  # wrong
llm.respond(5)  # wrong
llm.respond("x", schema=5)  # wrong


async def get_time(city: str) -> str:
    return city


async def main() -> None:
    reveal_type((await llm.arespond("Which?", schema=list[str])).parsed)  # list[str] | None
    reveal_type((await llm.chat(schema=City, tools=[get_time]).asend("Which?")).parsed)  # City | None
    said = [e async for e in llm.chat().astream("x") if isinstance(e, gptoss.TextDelta)]
    reveal_type(said)  # list[TextDelta]
    cities = [reply.parsed async for _, reply in llm.arespond_many(["Which?"], schema=City)]
    reveal_type(cities)  # list[City | None]
    async for event in llm.astream("x"):
        told(llm.respond("x"), event)
    await llm.arespond("x", temprature=1.0)  # wrong
    llm.astream("x", max_tokens="many")  # wrong
    llm.arespond("x")  # wrong


def told(reply: gptoss.Reply, event: gptoss.Event) -> str:
    return reply.text if isinstance(event, gptoss.Done) else ""
"""
LINES = list(enumerate(SCRIPT.splitlines(), 1))
TYPES = {n: line.split("  # ")[1] for n, line in LINES if line.strip().startswith("reveal_type")}
WRONG = {n for n, line in LINES if line.endswith("  # wrong")}


def mypy(folder: Path) -> tuple[dict[int, str], set[int]]:
    command = ["mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    run = [sys.executable, "-m", *command, f"--cache-dir={folder}"]
    out = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True).stdout
    told = re.findall(r'script\.py:(\d+): (\w+): (?:Revealed type is "(?:script\.)?(.*)")?', out)
    types = {int(line): re.sub(r"(\w+\.)+", "", shown) for line, _, shown in told if shown}
    return types, {int(line) for line, kind, _ in told if kind == "error"}


def pyright(folder: Path) -> tuple[dict[int, str], set[int]]:
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "strict", "pythonPlatform": "All"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "basedpyright",
        "--pythonpath",
        sys.executable,
        "--outputjson",
        "script.py",
    ]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    types, wrong = {}, set()
    for item in json.loads(out)["generalDiagnostics"]:
        line = item["range"]["start"]["line"] + 1
        if found := re.search(r'Type of ".*" is "(.*)"$', item["message"]):
            types[line] = found[1]
        elif item["severity"] == "error":
            wrong.add(line)
    return types, wrong


@pytest.mark.parametrize("check", [mypy, pyright])
def test_wrong_keywords_are_refused_and_replies_are_typed_by_their_schema(
    check: Callable[[Path], tuple[dict[int, str], set[int]]], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert check(tmp_path) == (TYPES, WRONG)
