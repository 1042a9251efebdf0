"""Properties of the prefix store, in memory and on disk."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import prefix
from mlx_gptoss.cache import SequenceCache
from mlx_gptoss.engine import load
from mlx_gptoss.prefix import PrefixStore, common_prefix
from mlx_gptoss.prefix_disk import PrefixDisk
from mlx_gptoss.sampling import SamplingParams
from tests.checkpoints import write_checkpoint
from tests.random_weights import Shape
from tests.test_cache import CONFIG, TinyModel

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=4, top_k=2, window=16, vocab=300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=())
MODEL = TinyModel(CONFIG)


def put(store: PrefixStore, tokens: np.ndarray, pinned: int = 0) -> None:
    known = store.match(tokens[:-1])
    cache = SequenceCache(CONFIG, mx.float32)
    start = cache.load(known.spans, known.states)
    MODEL(tokens[start:].tolist(), cache)
    state = cache.snapshot()
    store.insert(tokens, cache, [state] if state else [], pinned)


def some(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, n).astype(np.int32)


def outputs_after(store: PrefixStore, tokens: np.ndarray, n: int) -> np.ndarray:
    """The last rows of `tokens` computed from what the store holds of them."""
    match = store.match(tokens[:-n])
    cache = SequenceCache(CONFIG, mx.float32)
    start = cache.load(match.spans, match.states)
    return MODEL(tokens[start:].tolist(), cache)[-n:]


def test_a_match_is_the_longest_prefix_of_anything_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SPAN", 16)
    rng = random.Random(0)
    store = PrefixStore(10**9)
    held: list[np.ndarray] = []
    for _ in range(40):
        base = rng.choice(held)[: rng.randrange(1, 60)] if held else some(0, 20)
        tokens = np.concatenate([base, some(rng.randrange(10**6), rng.randrange(1, 40))])
        best = max((common_prefix(tokens, h) for h in held), default=0)
        assert store.common(tokens) == best == store.match(tokens).length
        put(store, tokens)
        held.append(tokens)
    assert store.nbytes == sum(n.kv_bytes + n.state_bytes for n in store.nodes())


def test_what_is_loaded_from_the_store_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SPAN", 16)
    store = PrefixStore(10**9)
    document = some(1, 50)
    put(store, np.concatenate([document, some(2, 20)]))
    put(store, np.concatenate([document[:33], some(3, 20)]))
    for seed, cut in ((4, 50), (5, 40), (6, 33), (7, 12)):
        tokens = np.concatenate([document[:cut], some(seed, 9)])
        want = MODEL(tokens.tolist(), SequenceCache(CONFIG, mx.float32))[-9:]
        np.testing.assert_allclose(outputs_after(store, tokens, 9), want, atol=1e-5)


def test_branches_share_what_they_have_in_common() -> None:
    one = PrefixStore(10**9)
    document = some(10, 500)
    put(one, np.concatenate([document, some(11, 10)]))
    alone = one.nbytes
    for i in range(9):
        put(one, np.concatenate([document, some(12 + i, 10)]))
    assert one.nbytes <= 1.5 * alone


def test_the_least_recently_used_go_first_and_pinned_prefixes_last() -> None:
    store = PrefixStore(10**9)
    system = some(20, 40)
    put(store, np.concatenate([system, some(21, 60)]), pinned=40)
    put(store, some(22, 100))
    put(store, some(23, 100))
    store.match(some(22, 100))
    store.shrink(int(store.nbytes * 0.6))
    assert store.common(some(22, 100)) == 100
    assert store.common(some(23, 100)) == 0
    assert store.common(system) == 40
    store.shrink(0)
    assert store.nbytes == 0 and len(store) == 0


def test_the_limit_holds_after_every_insertion() -> None:
    probe = PrefixStore(10**9)
    put(probe, some(30, 100))
    store = PrefixStore(3 * probe.nbytes)
    for i in range(12):
        put(store, some(31 + i, 100))
        assert store.nbytes <= store.limit
    assert store.common(some(42, 100)) == 100


def saved_store(folder: Path) -> PrefixStore:
    return PrefixStore(10**9, PrefixDisk(folder, "model", 10**9))


def test_a_restarted_store_reads_what_was_saved(tmp_path: Path) -> None:
    store = saved_store(tmp_path)
    tokens = np.concatenate([some(50, 60), some(51, 20)])
    put(store, tokens)
    put(store, np.concatenate([some(50, 60), some(52, 20)]))
    while store.save():
        pass
    again = saved_store(tmp_path)
    assert again.nbytes == 0 and again.common(tokens) == 80
    longer = np.concatenate([tokens, some(53, 5)])
    want = MODEL(longer.tolist(), SequenceCache(CONFIG, mx.float32))[-5:]
    np.testing.assert_allclose(outputs_after(again, longer, 5), want, atol=1e-5)
    assert again.match(tokens).states


def test_evicted_nodes_come_back_from_disk(tmp_path: Path) -> None:
    store = saved_store(tmp_path)
    put(store, some(60, 80))
    while store.save():
        pass
    store.shrink(0)
    assert store.nbytes == 0 and store.match(some(60, 80)).length == 80 and store.nbytes > 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "version", "model", "header"])
def test_a_damaged_or_foreign_file_is_a_miss(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved_store(tmp_path)
    put(store, some(70, 80))
    while store.save():
        pass
    (path,) = tmp_path.glob("*/*.safetensors")
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[-100] ^= 1
    elif damage == "cut":
        del raw[-100:]
    elif damage == "empty":
        raw.clear()
    elif damage == "version":
        raw = raw.replace(b'"version": "1"', b'"version": "9"')
    elif damage == "model":
        raw = raw.replace(b'"model": "model"', b'"model": "other"')
    else:
        raw[8:30] = b"\xff" * 22
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        again = saved_store(tmp_path)
        assert again.match(some(70, 80)).length == 0
    assert "is ignored" in caplog.text


def test_an_engine_resumes_after_a_restart(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", SHAPE)
    prompt = [random.Random(1).randrange(299) for _ in range(200)]
    with load(folder, kv_budget=32 * 2**20, prefix_cache=tmp_path / "kept") as llm:
        first = list(llm.generate(prompt, GREEDY))
    with load(folder, kv_budget=32 * 2**20, prefix_cache=tmp_path / "kept") as llm:
        stream = llm.submit(prompt, GREEDY)
        assert [o.token_id for o in stream] == first
        assert stream.cached_tokens == 199
    other = write_checkpoint(tmp_path / "other", SHAPE, seed=1)
    with load(other, kv_budget=32 * 2**20, prefix_cache=tmp_path / "kept") as llm:
        stream = llm.submit(prompt, GREEDY)
        list(stream)
        assert stream.cached_tokens == 0


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.test_prefix import put, saved_store, some
store = saved_store(Path(sys.argv[1]))
print("ready", flush=True)
for i in range(10**6):
    put(store, some(i, 60))
    while store.save():
        pass
"""


def test_a_process_killed_while_writing_leaves_no_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(Path(__file__).parent.parent)
    for wait in (0.05, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), root], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with caplog.at_level(logging.WARNING):
            store = saved_store(tmp_path)
            for i in range(10**6):
                length = store.match(some(i, 60)).length
                if length != 60:
                    # Not written yet: at most its first tokens are, by chance, those of another.
                    assert length < 6
                    break
        assert "ignored" not in caplog.text
        assert not list(tmp_path.glob("*/*.partial"))
