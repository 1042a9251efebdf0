"""/v1/completions on a scripted LLM: raw text or tokens in, raw text out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion

from mlx_gptoss.engine.request import TokenOutput, TokensDone
from mlx_gptoss.errors import ContextLengthError, GptOssError
from mlx_gptoss.sampling import TokenLogprobs
from mlx_gptoss.tokenizer import Tokenizer
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
    fields: dict[str, Any] = {"logprobs": 1, "stop": stop, "max_tokens": 8}
    whole = complete(scripted, **fields)["choices"][0]
    assert "".join(whole["logprobs"]["tokens"]) == whole["text"]
    events = read_events(complete(scripted, stream=True, **fields))
    pieces = [data["choices"][0] for _, data in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_an_echo_with_logprobs_scores_the_prompt(scripted: TestClient) -> None:
    choice = complete(scripted, prompt="hip", echo=True, logprobs=1, max_tokens=2)["choices"][0]
    assert choice["text"] == "hipab"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["h", "i", "p", "a", "b"]
    assert scores["token_logprobs"] == [None, -0.5, -1.0, -0.25, -0.25]
    assert scores["top_logprobs"] == [None, {"i": -0.5}, {"p": -1.0}, {"a": -0.25}, {"b": -0.25}]
    assert scores["text_offset"] == [0, 1, 2, 3, 4]


def test_a_prompt_is_scored_without_going_on(scripted: TestClient, llm: ScriptedLLM) -> None:
    llm.submitted.clear()
    body = complete(scripted, prompt=[[104, 105], [112]], echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in body["choices"]] == ["hi", "p"]
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [[None, -0.5], [None]]
    assert all(choice["finish_reason"] == "length" for choice in body["choices"])
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 0
    assert complete(scripted, max_tokens=0)["choices"][0]["text"] == ""
    assert complete(scripted, max_tokens=0, echo=True)["choices"][0]["text"] == "hi"
    assert llm.submitted == []


@pytest.mark.parametrize("most", [0, 3])
def test_a_scored_stream_adds_up(scripted: TestClient, most: int) -> None:
    fields: dict[str, Any] = {"prompt": "hip", "echo": True, "logprobs": 1, "max_tokens": most}
    whole = complete(scripted, **fields)["choices"][0]
    events = read_events(complete(scripted, stream=True, **fields))
    pieces = [data["choices"][0] for _, data in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_a_prompt_that_cannot_be_scored_is_an_error(
    scripted: TestClient, llm: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 0}
    assert complete(scripted, 400, **fields | {"prompt": [97] * 4097})["error"]["param"] == "prompt"
    room: dict[str, Any] = {"prompt": [97] * 4096, "echo": True, "logprobs": 1}
    assert complete(scripted, 400, **room)["error"]["param"] == "prompt"

    def score(*_: Any, **__: Any) -> Any:
        raise GptOssError("the engine failed")

    monkeypatch.setattr(llm, "score", score)
    assert complete(scripted, 500, **fields)["error"]["code"] == "engine_error"


def test_control_tokens_stay_out_of_the_text_unless_asked_for(
    scripted: TestClient, llm: ScriptedLLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = tokenizer.special
    said = [special.channel, *tokenizer.encode("final"), special.message, *tokenizer.encode("hi")]

    def submit(tokens: Any, *_: Any, sink: Any, **__: Any) -> Any:
        for token in [*said, special.return_]:
            sink(TokenOutput(token, TokenLogprobs(-0.25, ((token, -0.25),))))
        sink(TokensDone("stop", len(tokens), 0, len(said) + 1))
        return SimpleNamespace(prompt_tokens=len(tokens), cancel=lambda: None)

    monkeypatch.setattr(llm, "submit", submit)
    prompt = [special.start, *tokenizer.encode("assistant")]
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 1}
    plain = complete(scripted, **fields)["choices"][0]
    assert plain["text"] == "assistantfinalhi" and plain["finish_reason"] == "stop"
    full = complete(scripted, **fields, skip_special_tokens=False)["choices"][0]
    assert full["text"] == "<|start|>assistant<|channel|>final<|message|>hi"
    for choice in (plain, full):
        scores = choice["logprobs"]
        # Every token has its scores, the one that ended it included: evaluations count on that.
        assert len(scores["tokens"]) == len(prompt) + len(said) + 1
        assert scores["tokens"][-1] == "<|return|>"
        for token, start in zip(scores["tokens"], scores["text_offset"], strict=True):
            assert choice["text"].startswith(token, start) or token.startswith("<|")
    spelled = complete(scripted, prompt="x<|end|>", max_tokens=0, echo=True)["choices"][0]["text"]
    assert spelled == "x<|end|>", "text that spells one is text"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [99999999]},
        {"suffix": "x"},
        {"guided_regex": "x"},
        {"structured_outputs": {"choice": ["x"]}},
        {"response_format": {"type": "json_object"}},
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
