"""Fixtures of the server's tests: one application on a scripted engine, made once and reset for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.server import create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.scripted_engine import ScriptedEngine, answer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The byte tokenizer."""
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def _application(tokenizer: Tokenizer) -> tuple[ScriptedEngine, TestClient]:
    engine = ScriptedEngine(tokenizer)
    app = create_app(engine)  # type: ignore[arg-type]
    return engine, TestClient(app, base_url="http://localhost")


@pytest.fixture
def engine(_application: tuple[ScriptedEngine, TestClient]) -> Iterator[ScriptedEngine]:
    """The scripted engine behind `scripted`, with its default answers."""
    engine = _application[0]
    engine.write = answer
    engine.seen.clear()
    yield engine
    engine.write = answer


@pytest.fixture
def scripted(engine: ScriptedEngine, _application: tuple[ScriptedEngine, TestClient]) -> TestClient:
    """A client of an application with default settings."""
    return _application[1]
