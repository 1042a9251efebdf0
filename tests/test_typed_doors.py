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
from pydantic import BaseModel

import mlx_gptoss as gptoss


class City(BaseModel):
    name: str


llm = gptoss.load("demo", max_context=4096)
reveal_type(llm.respond("Which?", schema=City, temperature=0.0).parsed)
reveal_type(llm.chat(schema=City).send("Which?").parsed)
reveal_type(llm.respond("Which?").text)
llm.respond("x", temprature=1.0)
llm.respond("x", max_tokens="many")
llm.chat(instructons="Be brief.")
gptoss.load("demo", max_contxt=4096)


def told(reply: gptoss.Reply, event: gptoss.Event) -> str:
    return reply.text if isinstance(event, gptoss.Done) else ""
"""
TYPES = {11: "City | None", 12: "City | None", 13: "str"}
WRONG = {14, 15, 16, 17}


def mypy(folder: Path) -> tuple[dict[int, str], set[int]]:
    command = ["mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    run = [sys.executable, "-m", *command, f"--cache-dir={folder}"]
    out = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True).stdout
    told = re.findall(r'script\.py:(\d+): (\w+): (?:Revealed type is "(?:script\.)?(.*)")?', out)
    types = {int(line): shown for line, _, shown in told if shown}
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
