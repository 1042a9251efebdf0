"""Sampling as every API takes it: each field that SamplingParams offers, with its bounds."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from mlx_gptoss.sampling import SamplingParams, about
from tests.support.scripted_llm import ScriptedLLM

pytest_plugins = ["tests.support.server_fixtures"]

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": HI,
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": HI | {"max_tokens": 9},
}
# How each API calls the tokens to generate.
LIMITS = dict.fromkeys(REQUESTS, "max_tokens") | {"/v1/responses": "max_output_tokens"}
OFFERED = [name for name in SamplingParams.__dataclass_fields__ if about(name).kind is not None]


def highest(name: str) -> Any:
    bounds = about(name).bounds
    return bounds["le"] if "le" in bounds else int(bounds["lt"]) - 1


def sent(llm: ScriptedLLM, path: str) -> SamplingParams:
    params = llm.submitted[-1] if path == "/v1/completions" else llm.seen[-1][1]["params"]
    assert isinstance(params, SamplingParams)
    return params


@pytest.mark.parametrize("name", OFFERED)
@pytest.mark.parametrize("path", REQUESTS)
def test_every_field_is_taken_up_to_its_bound_by_every_api(
    scripted: TestClient, llm: ScriptedLLM, path: str, name: str
) -> None:
    field = LIMITS[path] if name == "max_tokens" else name
    most = 3 if name == "max_tokens" else highest(name)
    response = scripted.post(path, json=REQUESTS[path] | {field: most})
    assert response.status_code == 200, response.text
    assert getattr(sent(llm, path), name) == most
    error = scripted.post(path, json=REQUESTS[path] | {field: highest(name) + 1}).json()["error"]
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert error["message"].endswith(f"not {highest(name) + 1}.")


@pytest.mark.parametrize("path", REQUESTS)
def test_what_is_not_sent_keeps_its_default(scripted: TestClient, llm: ScriptedLLM, path: str) -> None:
    scripted.post(path, json=REQUESTS[path])
    params, default = sent(llm, path), SamplingParams()
    assert all(getattr(params, name) == getattr(default, name) for name in OFFERED if name != "max_tokens")


def test_several_choices_have_seeds_counted_up_from_the_requests(
    scripted: TestClient, llm: ScriptedLLM
) -> None:
    scripted.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "seed": 5})
    assert [params.seed for params in llm.submitted[-4:]] == [5, 6, 5, 6]
