"""Evaluations through the server: log-likelihoods as lm-eval asks for them are the logits'."""

from __future__ import annotations

import random
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

import mlx_gptoss
from mlx_gptoss.llm import LLM
from mlx_gptoss.server import create_app

ITEMS = 48
BATCH = 8
WORDS = "the cat sees a red ball and Anna lives in Rome 2 + 3 = 5 of it is not here today"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with mlx_gptoss.load("demo", max_context=512) as llm:
        yield llm


def likelihoods(body: dict[str, Any], contexts: list[int]) -> list[tuple[float, bool]]:
    """What lm-eval makes of a response: the sum over the continuation, and whether it is the greedy one.

    It leaves out the last token, which was generated because older servers generate at least one.
    """
    found = []
    for choice, context in zip(sorted(body["choices"], key=itemgetter("index")), contexts, strict=True):
        scores = choice["logprobs"]
        told, top = scores["token_logprobs"][context:-1], scores["top_logprobs"][context:-1]
        found.append((sum(told), all(one == max(best.values()) for one, best in zip(told, top, strict=True))))
    return found


def test_tokens_are_counted_by_the_server(llm: LLM) -> None:
    """As lm-eval does, which then needs no tokenizer of its own."""
    client = TestClient(create_app(llm), base_url="http://localhost")
    info = client.get("/tokenizer_info").json()
    special = llm.tokenizer.special
    for name, token in (("bos", special.startoftext), ("eos", special.return_), ("pad", special.endoftext)):
        told = client.post("/tokenize", json={"prompt": info[f"{name}_token"]}).json()
        assert (told["tokens"], told["count"], told["max_model_len"]) == ([token], 1, 512)
    text = "Anna lives in Rome.<|end|>"
    tokens = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert tokens == [*llm.tokenizer.encode(text.removesuffix("<|end|>")), special.end]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    for path, body, param in (
        ("/tokenize", {"prompt": "", "messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ):
        wrong = client.post(path, json=body)
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == param


def test_log_likelihoods_through_the_server_are_those_of_the_logits(llm: LLM) -> None:
    rng = random.Random(13)
    words = WORDS.split()
    items = []
    for _ in range(ITEMS):
        context = llm.tokenizer.encode(" ".join(rng.choices(words, k=rng.randrange(1, 12))))
        continuation = llm.tokenizer.encode(" " + " ".join(rng.choices(words, k=rng.randrange(1, 5))))
        if rng.random() < 0.3:  # some are what the model itself would say
            continuation = [int(llm.logits(context)[-1].argmax())]
        items.append((context, continuation))
    client = TestClient(create_app(llm), base_url="http://localhost")
    worst, greedy = 0.0, 0
    for start in range(0, ITEMS, BATCH):
        batch = items[start : start + BATCH]
        prompts = [context + continuation for context, continuation in batch]
        request = {
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "echo": True,
            "seed": 1,
        }
        response = client.post("/v1/completions", json={"model": "demo", **request})
        assert response.status_code == 200, response.text
        found = likelihoods(response.json(), [len(context) for context, _ in batch])
        for (context, continuation), (total, is_greedy) in zip(batch, found, strict=True):
            rows = llm.logits(context + continuation).astype(np.float64)[len(context) - 1 : -1]
            rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
            worst = max(worst, abs(total - sum(row[t] for row, t in zip(rows, continuation, strict=True))))
            assert is_greedy == (rows.argmax(-1).tolist() == continuation)
            greedy += is_greedy
    assert worst < 1e-4
    assert 5 < greedy < 43
