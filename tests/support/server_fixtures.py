"""Fixtures of the server's tests: one application on a scripted LLM, made once and reset for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.server import create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.scripted_llm import ScriptedLLM, answer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The byte tokenizer."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def _application(tokenizer: Tokenizer) -> tuple[ScriptedLLM, TestClient]:
    llm = ScriptedLLM(tokenizer)
    app = create_app(llm)  # type: ignore[arg-type]
    return llm, TestClient(app, base_url="http://localhost")


@pytest.fixture
def llm(_application: tuple[ScriptedLLM, TestClient]) -> Iterator[ScriptedLLM]:
    """The scripted LLM behind `scripted`, with its default answers."""
    llm = _application[0]
    llm.write = answer
    llm.seen.clear()
    yield llm
    llm.write = answer


@pytest.fixture
def scripted(llm: ScriptedLLM, _application: tuple[ScriptedLLM, TestClient]) -> TestClient:
    """A client of an application with default settings."""
    return _application[1]
