"""/v1/completions on a scripted LLM: raw text or tokens in, raw text out."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion

from mlx_gptoss.errors import ContextLengthError
from tests.support.scripted_llm import ScriptedLLM
from tests.support.server_help import read_events

pytest_plugins = ["tests.support.server_fixtures"]


def complete(client: TestClient, status: int = 200, **fields: Any) -> Any:
    reply = client.post("/v1/completions", json={"model": "any", "prompt": "hi", **fields})
    assert reply.status_code == status, reply.text
    return reply.text if fields.get("stream") and status == 200 else reply.json()


def test_a_raw_completion_goes_on_from_text_or_tokens(scripted: TestClient) -> None:
    completion = Completion.model_validate(complete(scripted), strict=True)
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("abcdefghijklmnop", "length")
    several = complete(scripted, prompt=["a", "b"], n=2, max_tokens=2, echo=True)
    assert [choice["text"] for choice in several["choices"]] == ["aab", "aab", "bab", "bab"]
    assert several["usage"]["prompt_tokens"] == 2
    assert complete(scripted, prompt=[104, 105], max_tokens=1)["choices"][0]["text"] == "a"


def test_a_raw_completion_ends_before_its_stop_text(scripted: TestClient) -> None:
    stopped = complete(scripted, stop=["ghi", "zz"])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("abcdef", "stop")
    assert complete(scripted, stop="pq")["choices"][0]["text"] == "abcdefghijklmnop"


def test_a_raw_stream_adds_up(scripted: TestClient) -> None:
    text = complete(scripted, stream=True, stop="ghi", echo=True, stream_options={"include_usage": True})
    events = [data for _, data in read_events(text)]
    assert events[-1] == "[DONE]"
    *pieces, last, usage = events[:-1]
    # OpenAI streams a null finish_reason up to the last piece, though the SDK's type knows none.
    assert [piece["choices"][0].pop("finish_reason") for piece in pieces] == [None] * len(pieces)
    for chunk in (
        last,
        usage,
        *({**p, "choices": [p["choices"][0] | {"finish_reason": "stop"}]} for p in pieces),
    ):
        Completion.model_validate(chunk, strict=True)
    assert "".join(piece["choices"][0]["text"] for piece in (*pieces, last)) == "hiabcdef"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["prompt_tokens"] == 2


def test_raw_logprobs_have_a_score_for_each_token(scripted: TestClient) -> None:
    scores = complete(scripted, logprobs=1, max_tokens=3)["choices"][0]["logprobs"]
    assert scores["tokens"] == ["a", "b", "c"]
    assert scores["text_offset"] == [0, 1, 2]
    assert scores["top_logprobs"][0] == {"a": -0.25}


@pytest.mark.parametrize("stop", ["defz", "def", "a", ["fgz", "h"]])
def test_raw_logprobs_are_those_of_the_text_streamed_or_not(scripted: TestClient, stop: Any) -> None:
    fields = {"logprobs": 1, "stop": stop, "max_tokens": 8}
    whole = complete(scripted, **fields)["choices"][0]
    assert "".join(whole["logprobs"]["tokens"]) == whole["text"]
    events = read_events(complete(scripted, stream=True, **fields))
    pieces = [data["choices"][0] for _, data in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [99999999]},
        {"suffix": "x"},
        {"best_of": 3},
        {"prompt": [["a"]]},
    ],
)
def test_wrong_raw_completions_are_refused(scripted: TestClient, fields: dict[str, Any]) -> None:
    assert complete(scripted, 400, **fields)["error"]["param"] is not None


@pytest.mark.parametrize(("prompt", "param"), [("too long", "prompt"), (["a", "too long"], "prompt[1]")])
def test_a_raw_prompt_that_does_not_fit_is_named(
    scripted: TestClient, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch, prompt: Any, param: str
) -> None:
    submit = llm.submit

    def bounded(tokens: Any, *args: Any, **options: Any) -> Any:
        if len(tokens) > 4:
            raise ContextLengthError(len(tokens), 4)
        return submit(tokens, *args, **options)

    monkeypatch.setattr(llm, "submit", bounded)
    error = complete(scripted, 400, prompt=prompt)["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
