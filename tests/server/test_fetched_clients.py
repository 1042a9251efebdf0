"""Clients that `make clients` fetches, talking to a live server: those for node, and those for Python that
would change what is installed here. Each is a script in clients/, run by what has its packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM
from tests.support.server_help import live

pytest_plugins = ["tests.support.server_fixtures"]

KEY = "sk-test"
CLIENTS = Path(__file__).parent / "clients"
ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("GPTOSS_PYTHON_CLIENTS", ROOT / "build" / "clients")) / "bin" / "python"
NODE = Path(os.environ.get("GPTOSS_NODE_CLIENTS", CLIENTS))
for_python = pytest.mark.skipif(
    not PYTHON.exists(), reason="run `make clients` to fetch the clients for Python"
)


@pytest.fixture(scope="module")
def scripted_url(tokenizer: Tokenizer) -> Iterator[str]:
    """A live server of scripted answers."""
    app = create_app(ScriptedLLM(tokenizer), ServerSettings(port=0, api_key=KEY))  # type: ignore[arg-type]
    with live(app) as url:
        yield url


def run_client(name: str, url: str) -> Any:
    """What a script of clients/ prints when it has talked to a server."""
    environment = os.environ | {"BASE_URL": url, "API_KEY": KEY, "PACKAGES": str(NODE)}
    command = [PYTHON] if name.endswith(".py") else ["node"]
    done = subprocess.run(
        [*command, CLIENTS / name], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.skipif(not (NODE / "node_modules/openai").is_dir(), reason="run `make clients` to fetch openai")
def test_openai_for_node_runs_a_tool(scripted_url: str) -> None:
    assert run_client("openai_client.mjs", scripted_url) == {
        "chat": "The tool says: sunny",
        "responses": "The tool says: sunny",
        "parsed": {"city": "Paris"},
    }


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.skipif(
    not (NODE / "node_modules/@anthropic-ai/sdk").is_dir(),
    reason="run `make clients` to fetch @anthropic-ai/sdk",
)
def test_anthropic_for_node_completes_its_tool_loop(scripted_url: str) -> None:
    assert run_client("anthropic_client.mjs", scripted_url) == {
        "whole": "The tool says: sunny in Paris",
        "streamed": "The tool says: sunny in Paris",
        "structured": {"city": "Paris"},
        "models": "scripted",
    }


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.skipif(not (NODE / "node_modules/ai").is_dir(), reason="run `make clients` to fetch ai")
def test_vercels_ai_sdk_completes_its_tool_loop_over_every_api(scripted_url: str) -> None:
    told = run_client("ai_sdk_client.mjs", scripted_url)
    assert set(told) == {"chat", "responses", "compatible", "anthropic"}
    for name, one in told.items():
        assert one["text"] == one["streamed"] == "The tool says: sunny in Paris", name
        assert one["steps"] == 2 and one["object"] == {"city": "Paris"}, name
    assert told["compatible"]["reasoning"]


@pytest.mark.skipif(
    not (NODE / "node_modules/@openai/codex").is_dir(), reason="run `make clients` to fetch codex"
)
def test_codex_completes_a_function_call_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tests.support.scripted_llm import Script

    def write(conversation: Any, options: Any) -> Script:
        if conversation.messages[-1].role == "tool":
            output = conversation.messages[-1].content
            return Script(text="found it" if "swordfish" in output else f"no: {output}")
        assert "exec_command" in [tool.name for tool in conversation.tools]
        return Script(calls=[("exec_command", json.dumps({"cmd": "echo sword''fish"}))])

    llm = ScriptedLLM(tokenizer, write, max_context=100_000)
    app = create_app(llm, ServerSettings(port=0))  # type: ignore[arg-type]
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    with live(app) as url:
        (home / "config.toml").write_text(
            'model = "gpt-oss-20b"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
            f'base_url = "{url}/v1"\nwire_api = "responses"\n',
            encoding="utf-8",
        )
        flags = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
        done = subprocess.run(
            [NODE / "node_modules/.bin/codex", *flags, "find it"],
            cwd=work,
            env=os.environ | {"CODEX_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("found it")
    assert any(m.role == "tool" for m in llm.seen[-1][0].messages)
    assert any(m.token_ids for m in llm.seen[-1][0].messages), "the call's own tokens"


@for_python
def test_litellm_completes_its_tool_loop_over_every_api(scripted_url: str) -> None:
    told = run_client("litellm_client.py", scripted_url)
    assert set(told) == {"openai", "hosted_vllm", "anthropic", "ollama", "responses"}
    assert told.pop("responses") == {"text": "You said: hello"}
    for name, one in told.items():
        assert one["arguments"] == one["object"] == {"city": "Paris"}, name
        assert one["text"] == one["streamed"] == "The tool says: sunny", name


@for_python
def test_langchain_completes_its_tool_loop_over_both_apis(scripted_url: str) -> None:
    whole = "The tool says: sunny in Paris"
    one = {"calls": 1, "text": whole, "streamed": whole, "object": "Paris"}
    assert run_client("langchain_client.py", scripted_url) == {"chat": one, "responses": one}


@for_python
def test_pydantic_ai_completes_its_tool_loop_over_both_apis(scripted_url: str) -> None:
    whole = "The tool says: sunny in Paris"
    one = {"text": whole, "streamed": whole, "object": "Paris"}
    assert run_client("pydantic_ai_client.py", scripted_url) == {"chat": one, "responses": one}


@for_python
def test_llama_index_completes_its_tool_loop(scripted_url: str) -> None:
    whole = "The tool says: sunny in Paris"
    told = run_client("llama_index_client.py", scripted_url)
    assert told == {"text": whole, "streamed": whole, "object": "Paris"}


@for_python
def test_lm_evals_log_likelihoods_are_those_of_the_logits() -> None:
    with mlx_gptoss.load("demo", max_context=512) as llm:
        with live(create_app(llm, ServerSettings(port=0, api_key=KEY))) as url:
            told = run_client("lm_eval_client.py", url)
        assert told["backend"] == "remote" and len(told["items"]) == 16
        assert 0 <= told["accuracy"] <= 1 and 0 <= told["exact"] <= 1
        for item in told["items"]:
            context = llm.tokenizer.encode(item["context"])
            whole = llm.tokenizer.encode(item["context"] + item["continuation"])
            rows = llm.logits(whole).astype(np.float64)[len(context) - 1 : -1]
            rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
            continuation = whole[len(context) :]
            expected = sum(row[token] for row, token in zip(rows, continuation, strict=True))
            assert abs(item["score"] - expected) < 1e-4
            assert item["greedy"] == (rows.argmax(-1).tolist() == continuation)
