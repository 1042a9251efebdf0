"""A request's `model` may name an adapter of the model that is served."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.server import create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 20},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "hi", "stream": False},
}


@pytest.fixture
def llm(tokenizer: Tokenizer) -> ScriptedLLM:
    made = ScriptedLLM(tokenizer)
    made.adapters = ("sql", "law")
    return made


@pytest.fixture
def client(llm: ScriptedLLM) -> TestClient:
    return TestClient(create_app(llm), base_url="http://localhost")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(
    ("model", "adapter"),
    [("scripted:sql", "sql"), ("law", "law"), ("x/y:law", "law"), ("scripted", None), ("other:latest", None)],
)
def test_every_api_takes_the_adapter_from_the_model(
    path: str, model: str, adapter: str | None, llm: ScriptedLLM, client: TestClient
) -> None:
    response = client.post(path, json={"model": model, **REQUESTS[path]})
    assert response.status_code == 200, response.text
    assert [options["adapter"] for _, options in llm.seen] == [adapter]


def test_an_adapter_that_is_not_there_is_no_model(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={"model": "scripted:sq", "messages": MESSAGES})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert "no adapter 'sq' here: this server has 'sql', 'law'" in response.json()["error"]["message"]


def test_adapters_are_listed_with_the_model_that_they_belong_to(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [(m["id"], m.get("parent")) for m in listed] == [
        ("scripted", None),
        ("scripted:sql", "scripted"),
        ("scripted:law", "scripted"),
    ]
    assert client.get("/v1/models/scripted:law").json()["parent"] == "scripted"
    assert client.get("/v1/models/scripted:x").status_code == 404
