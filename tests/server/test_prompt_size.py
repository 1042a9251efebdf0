"""Prompts far beyond the context, over the demo model: refused soon, truncated exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

import mlx_gptoss
from mlx_gptoss.errors import ContextLengthError
from mlx_gptoss.harmony import Conversation, Message, render
from mlx_gptoss.llm import LLM
from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer

CONTEXT = 512
LONG = "What is 17 + 25? " * 200_000  # 3.4 MB


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with mlx_gptoss.load("demo", max_context=CONTEXT) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(llm: LLM) -> TestClient:
    return TestClient(create_app(llm, ServerSettings()), base_url="http://localhost")


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all texts that are tokenised."""
    lengths: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    return lengths


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", {"messages": [user(LONG)]}, "messages"),
    "chat of many": ("/v1/chat/completions", {"messages": [user("hello there")] * 9000}, "messages"),
    "responses": ("/v1/responses", {"input": LONG}, "input"),
    "messages": ("/v1/messages", {"max_tokens": 1, "messages": [user(LONG)]}, "messages"),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": [user(LONG)]}, "messages"),
    "completions": ("/v1/completions", {"prompt": LONG}, "prompt"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_prompt_far_too_long_is_refused_without_tokenising_it(
    client: TestClient, tokenised: list[int], name: str
) -> None:
    path, fields, field = REQUESTS[name]
    response = client.post(path, json=fields)
    error = response.json()["error"]
    # Anthropic's clients read a number, so more of it is counted: up to a few contexts.
    told, limit = ("too long", 200_000) if name == "messages" else ("at least", 100_000)
    assert response.status_code == 400 and told in error["message"]
    if "param" in error:
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert sum(tokenised) < limit


def test_a_prompt_a_little_too_long_is_told_its_length(client: TestClient) -> None:
    error = client.post("/v1/chat/completions", json={"messages": [user("a b c " * 400)]}).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_python_callers_are_spared_as_well(llm: LLM, tokenised: list[int]) -> None:
    with pytest.raises(ContextLengthError) as caught:
        llm.respond(LONG)
    assert caught.value.at_least and caught.value.prompt_tokens > CONTEXT
    assert sum(tokenised) < 100_000


def test_counting_goes_beyond_the_context(client: TestClient, llm: LLM) -> None:
    text = "What is 17 + 25? " * 100
    response = client.post("/v1/messages/count_tokens", json={"messages": [user(text)]})
    assert response.json()["input_tokens"] > CONTEXT


def test_truncation_keeps_all_turns_that_fit(client: TestClient, llm: LLM, tokenised: list[int]) -> None:
    turns = [user(f"What is {i} + 25?") for i in range(3000)]
    body = {"input": turns, "truncation": "auto", "max_output_tokens": 1, "store": False}
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    # Not each of 3,000 conversations anew, of which one has 50,000 characters.
    assert sum(tokenised) < 1_000_000
    used = response.json()["usage"]["input_tokens"]
    one = len(render(Conversation([Message.user("What is 2999 + 25?")]), llm.tokenizer)) // 4
    assert CONTEXT - 4 * one <= used < CONTEXT
