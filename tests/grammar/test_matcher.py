"""Masks have the vocabulary's size, and compiled grammars are kept within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from mlx_gptoss.grammar import matcher
from mlx_gptoss.grammar.matcher import Vocabulary
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer


def tokenizer_of(folder: Path, size: int) -> Tokenizer:
    """The byte tokenizer with reserved tokens up to this size."""
    path = write_byte_tokenizer(folder) / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    last = content["added_tokens"][-1]
    for i in range(last["id"] + 1, size):
        content["added_tokens"].append({**last, "id": i, "content": f"<|reserved_{i}|>"})
    path.write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("size", [319, 320, 321])
def test_a_mask_has_a_bit_for_every_token_and_no_word_more(tmp_path: Path, size: int) -> None:
    tokenizer = tokenizer_of(tmp_path, size)
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.size == tokenizer.vocab_size == size
    masks = [vocabulary.only(5), vocabulary.text_or(5), vocabulary.matcher('start: "a"').mask(5)]
    assert {mask.shape for mask in masks} == {(-(-size // 32),)}
    assert np.flatnonzero(np.unpackbits(masks[0].view(np.uint8), bitorder="little")).tolist() == [5]
    text = np.flatnonzero(np.unpackbits(vocabulary.text_or(size - 1).view(np.uint8), bitorder="little"))
    assert text.tolist() == [*(i for i in range(size) if not tokenizer.is_special(i)), size - 1]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Vocabulary, list[str], list[float]]:
    """A vocabulary, the grammars it has compiled, and a clock: [now, what compiling one takes]."""
    told: list[str] = []
    clock = [0.0, 0.0]

    def compile(tokenizer: Any, grammar: str, **options: Any) -> LLMatcher:
        told.append(grammar)
        clock[0] += clock[1]
        return LLMatcher(tokenizer, grammar, **options)

    monkeypatch.setattr(matcher, "LLMatcher", compile)
    monkeypatch.setattr("mlx_gptoss.grammar.matcher.time.perf_counter", lambda: clock[0])
    return Vocabulary(tokenizer_of(tmp_path, 320)), told, clock


A, B, C = ('start: "a"', 'start: "b"', 'start: "c"')
Compiled = tuple[Vocabulary, list[str], list[float]]


def test_beyond_their_number_those_unused_longest_are_forgotten(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, told, _ = compiled
    monkeypatch.setattr(matcher, "KEPT_GRAMMARS", 2)
    for grammar in (A, B, A, C, A, C, B):
        vocabulary.matcher(grammar)
    assert told == [A, B, C, B]


def test_beyond_the_time_they_took_those_unused_longest_are_forgotten(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, told, clock = compiled
    monkeypatch.setattr(matcher, "KEPT_SECONDS", 1.0)
    clock[1] = 0.5
    for grammar in (A, B, A, C, A, C, B):  # two of them take a second, which is not too long
        vocabulary.matcher(grammar)
    assert told == [A, B, C, B]
    clock[1] = 9.0  # one that takes longer than all may is kept until the next
    for grammar in ('start: "d"', 'start: "d"', A, 'start: "d"'):
        vocabulary.matcher(grammar)
    assert told[4:] == ['start: "d"', A, 'start: "d"']
