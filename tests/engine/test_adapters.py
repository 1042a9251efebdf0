"""Adapters through the engine: by name, several in a batch, loaded and unloaded while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mlx_gptoss as gptoss
from mlx_gptoss.checkpoint.adapter import write_adapter
from mlx_gptoss.engine.options import EngineKeywords
from mlx_gptoss.errors import AdapterError, BusyError, ModelNotFoundError, RequestError
from mlx_gptoss.model.config import read_config
from mlx_gptoss.sampling import SamplingParams
from tests.support.adapters import random_adapter

RANKS = {"a": 2, "b": 4, "c": 8, "d": 4}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=())


def prompt(seed: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 319, length)]


@pytest.fixture(scope="module")
def folders(bare_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config, root = read_config(bare_folder)[0], tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        write_adapter(root / name, random_adapter(config, rank, (0, 1), seed), config)
    return {name: root / name for name in RANKS}


@pytest.fixture(scope="module")
def llm(bare_folder: Path, folders: dict[str, Path]) -> Iterator[gptoss.LLM]:
    with gptoss.load(bare_folder, adapters=folders, kv_budget=1 << 26) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(bare_folder: Path, folders: dict[str, Path]) -> dict[str | None, list[list[int]]]:
    """What each adapter by itself goes on with after four prompts."""
    found: dict[str | None, list[list[int]]] = {}
    for name in (None, *folders):
        with gptoss.load(bare_folder, adapter=folders.get(name or ""), kv_budget=1 << 26) as one:
            found[name] = [list(one.generate(prompt(i, 20 + 9 * i), GREEDY)) for i in range(4)]
    return found


def test_requests_of_several_adapters_at_once_equal_each_alone(
    llm: gptoss.LLM, alone: dict[str | None, list[list[int]]]
) -> None:
    asked = [(name, i) for i in range(4) for name in ("a", None, "b", "c", "d", None)]
    streams = [llm.submit(prompt(i, 20 + 9 * i), GREEDY, adapter=name) for name, i in asked]
    for (name, i), stream in zip(asked, streams, strict=True):
        assert [output.token_id for output in stream] == alone[name][i], (name, i)
    assert len({tuple(found[0]) for found in alone.values()}) == 5


def test_the_logits_of_an_adapter_are_its_own(
    llm: gptoss.LLM, bare_folder: Path, folders: dict[str, Path]
) -> None:
    tokens = prompt(9, 40)
    with gptoss.load(bare_folder, adapter=folders["b"]) as one:
        expected = one.logits(tokens)
        assert np.abs(one.logits(tokens, adapter="base") - llm.logits(tokens)).max() < 1e-4
    assert np.abs(llm.logits(tokens, adapter="b") - expected).max() < 1e-4
    assert np.abs(llm.logits(tokens) - expected).max() > 0.1


def test_a_prefix_is_used_again_by_its_own_adapter_alone(llm: gptoss.LLM) -> None:
    tokens = prompt(30, 200)

    def cached(name: str | None) -> int:
        stream = llm.submit(tokens, GREEDY, adapter=name)
        list(stream)
        return stream.cached_tokens

    assert [cached("a"), cached("b"), cached(None)] == [0, 0, 0]
    assert min(cached("a"), cached("b"), cached(None)) > 190


def test_a_prefix_on_disk_is_found_by_what_its_adapter_does(
    bare_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """After a restart, under whatever name or number; never by the base or by another adapter."""
    tokens = prompt(31, 200)
    where: EngineKeywords = {"kv_budget": 1 << 26, "prefix_cache": tmp_path}
    with gptoss.load(bare_folder, adapters={"a": folders["a"]}, **where) as first:
        written = list(first.generate(tokens, GREEDY, adapter="a"))
    shuffled = {"b": folders["b"], "x": folders["a"]}
    with gptoss.load(bare_folder, adapters=shuffled, **where) as again:
        for name, cached in (("b", 0), ("base", 0), ("x", 199)):
            stream = again.submit(tokens, GREEDY, adapter=name)
            assert ([o.token_id for o in stream] == written) == (name == "x")
            assert stream.cached_tokens == cached, name
        again.load_adapter("x", folders["c"])  # another one by that name
        stream = again.submit(tokens, GREEDY, adapter="x")
        list(stream)
        assert stream.cached_tokens == 0


def test_an_adapter_comes_and_goes_while_the_engine_runs(
    llm: gptoss.LLM, folders: dict[str, Path], alone: dict[str | None, list[list[int]]]
) -> None:
    llm.load_adapter("e", folders["a"])
    assert list(llm.generate(prompt(0, 20), GREEDY, adapter="e")) == alone["a"][0]
    llm.load_adapter("e", folders["b"])  # of the same name: nothing of the other is left
    assert list(llm.generate(prompt(0, 20), GREEDY, adapter="e")) == alone["b"][0]
    running = llm.submit(prompt(1, 20), SamplingParams(max_tokens=400, stop_token_ids=()), adapter="e")
    next(running)
    with pytest.raises(BusyError, match="in use by 1"):
        llm.unload_adapter("e")
    running.cancel()
    list(running)
    llm.unload_adapter("e")
    assert "e" not in llm.adapters
    with pytest.raises(RequestError, match="adapter is 'e': expected one of 'a', 'b', 'c', 'd'"):
        llm.submit(prompt(0, 20), GREEDY, adapter="e")
    assert list(llm.generate(prompt(0, 20), GREEDY, adapter="a")) == alone["a"][0]


def test_an_adapter_that_cannot_be_is_told(llm: gptoss.LLM, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="adapter name 'a/b'"):
        llm.load_adapter("a/b", folders["a"])
    with pytest.raises(RequestError, match="and not 'base'"):
        llm.load_adapter("base", folders["a"])
    with pytest.raises(ModelNotFoundError, match="expected an adapter's folder or a Hub id"):
        llm.load_adapter("x", "nowhere")
    with pytest.raises(AdapterError, match="no adapter there"):
        llm.load_adapter("x", tmp_path)
    with pytest.raises(RequestError, match="adapter is 'x'"):
        llm.unload_adapter("x")


def test_a_session_and_a_reply_speak_with_their_adapter(text_folder: Path, folders: dict[str, Path]) -> None:
    with gptoss.load(text_folder, adapters=folders) as loaded:
        said = [
            loaded.respond("Hi", temperature=0.0, max_tokens=8, adapter=name).messages
            for name in ("a", "base")
        ]
        chat = loaded.chat(temperature=0.0, max_tokens=8, adapter="a")
        assert chat.send("Hi").messages == said[0] != said[1]


def test_an_adapter_is_not_replaced_while_a_text_is_scored_with_it(
    bare_folder: Path, folders: dict[str, Path]
) -> None:
    tokens = prompt(41, 100)
    with gptoss.load(bare_folder, adapter=folders["a"], prefill_chunk=32) as llm:
        expected = llm.score(tokens)
        replacing = [
            threading.Thread(target=llm.load_adapter, args=(llm.engine.default_adapter, folders["b"]))
        ]

        def begin() -> bool:
            for thread in replacing:
                if not thread.ident:
                    thread.start()
                assert thread.is_alive()
            return False

        assert llm.score(tokens, keep=True, cancelled=begin) == expected
        replacing[0].join()
        assert llm.score(tokens) != expected
