"""Hostile schemas and grammars end one request: never the process, and within a time limit."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar import guard_worker
from mlx_gptoss.grammar.guard import Guard
from mlx_gptoss.harmony import Tool
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.constraints import constrain
from tests.support.server_help import wait_until


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(tmp_path_factory.mktemp("guard")))


@pytest.fixture
def guard() -> Any:
    guard = Guard(seconds=0.5)
    yield guard
    guard.close()


def plain_chain(n: int) -> dict[str, Any]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{n}": {"type": "string"}}}


def object_chain(n: int) -> dict[str, Any]:
    def link(to: int) -> dict[str, Any]:
        return {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{to}"}}}

    return {**link(0), "$defs": {f"a{i}": link(i + 1) for i in range(n)} | {f"a{n}": {}}}


def rules(n: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(n)) + f'r{n}: "x"\n'


HOSTILE: dict[str, dict[str, Any]] = {
    "plain references": {"schema": plain_chain(2500)},
    "references through objects": {"schema": object_chain(930)},
    "rules": {"lark": rules(5000)},
    "optional letters": {"regex": "a?" * 30_000},
    "a long enum": {"schema": {"enum": [f"v{i}" for i in range(100_000)]}},
    "many choices": {"choices": [f"v{i}" for i in range(100_000)]},
    "nested groups": {"regex": "(" * 3000 + "a" + ")" * 3000},
    "nested arrays": {"lark": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_form_is_refused_in_time(tok: Tokenizer, name: str) -> None:
    with pytest.raises(SchemaError) as told:
        constrain(tok, **HOSTILE[name])
    assert len(str(told.value)) < 400 and "\n" not in str(told.value)


@pytest.mark.parametrize("schema", [plain_chain(2500), object_chain(930)], ids=["plain", "objects"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_hostile_tool_harms_nobody(tok: Tokenizer, schema: dict[str, Any], strict: bool) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "$defs": schema["$defs"]}
    tool = Tool("t", "", parameters)
    if strict:
        with pytest.raises(SchemaError, match="parameters of t"):
            constrain(tok, tools=[tool])
    else:
        assert constrain(tok, tools=[tool], strict_tools=False) is not None


def test_references_that_go_round_are_no_chain(tok: Tokenizer) -> None:
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    assert constrain(tok, schema=tree) is not None
    wide = {f"a{i}": {"$ref": "#/$defs/leaf"} for i in range(300)}
    schema = {"type": "object", "properties": wide, "$defs": {"leaf": {"type": "integer"}}}
    assert constrain(tok, schema=schema) is not None


def test_what_crashes_the_compiler_is_told_and_the_next_grammar_is_tried(guard: Guard) -> None:
    crashing = json.dumps({"grammars": [{"lark_grammar": rules(5000)}]})
    for _ in range(2):
        with pytest.raises(ValueError, match="make it simpler"):
            guard.check(crashing)
        guard.check("start: /[a-z]+/")


def test_what_takes_too_long_is_ended(guard: Guard) -> None:
    with pytest.raises(ValueError, match=r"longer than 0\.5 s"):
        guard.check("start: /" + "a?" * 30_000 + "/")


@pytest.mark.parametrize(("times", "told"), [(1, r"longer than 0\.5 s"), (2, "killed twice")])
def test_a_worker_that_is_killed_at_work_is_asked_once_more(
    guard: Guard, monkeypatch: pytest.MonkeyPatch, times: int, told: str
) -> None:
    pids: list[int | None] = []
    wait = select.select

    def killing(*arguments: Any) -> Any:
        pids.append(guard.pid)
        if len(pids) <= times and guard.pid is not None:
            os.kill(guard.pid, signal.SIGKILL)
        return wait(*arguments)

    monkeypatch.setattr("mlx_gptoss.grammar.guard.select.select", killing)
    with pytest.raises(ValueError, match=told):
        guard.check("start: /" + "a?" * 30_000 + "/")
    assert len(set(pids)) == 2


def test_a_grammar_is_walked_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[int] = []

    class Noting:
        """A matcher that notes the bytes it is walked by."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._matcher = LLMatcher(*arguments, **options)

        def consume_token(self, token: int) -> bool:
            walked.append(token)
            return bool(self._matcher.consume_token(token))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._matcher, name)

    monkeypatch.setattr("llguidance.LLMatcher", Noting)
    assert guard_worker.verdict('start: "abc"') == ""
    assert walked[:3] == list(b"abc")
    walked.clear()
    assert guard_worker.verdict("start: /a+b*/") == ""
    assert len(walked) == guard_worker.STEPS and set(walked) <= set(b"ab")


def test_a_worker_that_was_killed_is_started_again(guard: Guard) -> None:
    guard.check('start: "a"')
    assert guard.pid is not None
    os.kill(guard.pid, signal.SIGKILL)
    guard.check('start: "b"')


def test_a_worker_ends_with_the_process_that_asks(tmp_path: Path) -> None:
    code = (
        "from mlx_gptoss.grammar.guard import GUARD; GUARD.check('start: \"a\"'); "
        "print(GUARD.pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)

    def ended() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and " Z " in stat.read_text()  # nobody has asked for its status

    wait_until(ended)
