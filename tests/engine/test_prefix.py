"""Properties of the prefix store, in memory and on disk."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.safetensors import read_folder
from mlx_gptoss.engine import prefix_store as prefix
from mlx_gptoss.engine.prefix_disk import VERSION, PrefixDisk, Span, fingerprint
from mlx_gptoss.engine.prefix_store import Node, PrefixStore, common_prefix
from mlx_gptoss.errors import RequestError
from mlx_gptoss.llm import load
from mlx_gptoss.model.sequence_cache import SequenceCache, WindowState
from mlx_gptoss.sampling import SamplingParams
from tests.model.test_cache import CONFIG, TinyModel
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

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


def test_a_span_that_cannot_be_written_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = PrefixDisk(tmp_path, "model", 10**9)
    store = PrefixStore(10**9, disk)
    for seed in (50, 51):
        put(store, some(seed, 60))
    write = disk.write
    failed: list[bool] = []

    def once(*arguments: Any) -> Path:
        if not failed:
            failed.append(True)
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(disk, "write", once)
    while store.save():
        pass
    again = saved_store(tmp_path)
    assert sorted(again.common(some(seed, 60)) for seed in (50, 51)) == [0, 60]


def test_a_span_whose_file_is_gone_is_cut_all_the_same(tmp_path: Path) -> None:
    store = saved_store(tmp_path)
    put(store, np.concatenate([some(50, 60), some(51, 20)]))
    while store.save():
        pass
    for path in tmp_path.glob("*/*.prefix"):
        path.unlink()  # as another process does that makes room
    other = np.concatenate([some(50, 60), some(52, 20)])
    put(store, other)
    assert store.common(other) == 80 and len(store) == 3


def test_a_cache_that_was_taken_in_holds_no_memory_of_its_own() -> None:
    tokens, cache = some(50, 60), SequenceCache(CONFIG, mx.float32)
    MODEL(tokens.tolist(), cache)
    assert any(array.nbytes for layer in cache.full for array in layer.arrays())
    PrefixStore(10**9).insert(tokens, cache, [])
    assert not any(array.nbytes for layer in cache.full for array in layer.arrays())


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
    (path,) = tmp_path.glob("*/*.prefix")
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[-100] ^= 1
    elif damage == "cut":
        del raw[-100:]
    elif damage == "empty":
        raw.clear()
    elif damage == "version":
        raw = raw.replace(f'"version":"{VERSION}"'.encode(), b'"version":"9"')
    elif damage == "model":
        raw = raw.replace(b'"model":"model"', b'"model":"other"')
    else:
        raw[40:62] = b"\xff" * 22
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        again = saved_store(tmp_path)
        assert again.match(some(70, 80)).length == 0
    assert "is ignored" in caplog.text


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        {"__metadata__": []},
        {"__metadata__": "x"},
        {"__metadata__": {"before": []}},
        {"__metadata__": {"upto": {}}},
        {"__metadata__": {"tokens": ""}},
        {"__metadata__": {"tokens": "1 2 x"}},
        {"__metadata__": {"tokens": f"{1 << 40}"}},
        {"part.0": {"data_offsets": None}},
        {"part.0": {"shape": []}},
        {"part.0": {"data_offsets": [0, 1 << 62]}},
    ],
)
def test_a_header_of_any_form_is_a_miss(tmp_path: Path, header: Any) -> None:
    store = saved_store(tmp_path)
    put(store, some(70, 80))
    while store.save():
        pass
    (path,) = tmp_path.glob("*/*.prefix")
    raw = path.read_bytes()
    length = int.from_bytes(raw[32:40], "little")
    written = json.loads(raw[40 : 40 + length])
    if isinstance(header, dict):
        for key, value in header.items():
            written[key] = written[key] | value if isinstance(value, dict) else value
        header = written
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + raw[40 + length :]
    path.write_bytes(raw[:32] + data)
    assert PrefixDisk(tmp_path, "model", 10**9).read(path) is None
    assert saved_store(tmp_path).match(some(70, 80)).length == 0


def test_a_header_nested_without_end_is_a_miss(tmp_path: Path) -> None:
    folder = PrefixDisk(tmp_path, "model", 10**9).folder
    (folder / "deep.prefix").write_bytes(bytes(32) + (10**5).to_bytes(8, "little") + b"[" * 10**5)
    assert len(saved_store(tmp_path)) == 0


def test_what_is_no_file_of_ours_is_a_miss_at_once(tmp_path: Path) -> None:
    folder = PrefixDisk(tmp_path, "model", 10**9).folder
    os.mkfifo(folder / "a-b.prefix")
    (folder / "c-d.prefix").symlink_to("/dev/zero")
    with (folder / "e-f.prefix").open("wb") as sparse:
        sparse.write(bytes(32) + (1 << 32).to_bytes(8, "little"))
        sparse.truncate(4 << 30)
    store = saved_store(tmp_path)
    assert len(store) == 0


def test_a_file_that_was_written_without_the_key_is_a_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    forger = saved_store(theirs)
    put(forger, some(70, 80))
    while forger.save():
        pass
    (forged,) = theirs.glob("*/*.prefix")
    shutil.copy(forged, PrefixDisk(mine, "model", 10**9).folder)
    assert saved_store(mine).match(some(70, 80)).length == 0
    assert "checksum is wrong" in caplog.text


def test_a_file_with_shapes_of_another_model_is_a_miss(tmp_path: Path) -> None:
    store = saved_store(tmp_path)
    put(store, some(70, 80))
    while store.save():
        pass
    narrow = SequenceCache(replace(CONFIG, num_kv_heads=1), mx.float32)
    (wanted,) = narrow.export([(0, 0)])

    def fits(tokens: int, parts: Sequence[mx.array], states: Iterable[WindowState]) -> bool:
        return [p.shape[1] for p in parts] == [w.shape[1] for w in wanted] and all(map(narrow.takes, states))

    disk = PrefixDisk(tmp_path, "model", 10**9)
    assert PrefixStore(10**9, disk, fits).match(some(70, 80)).length == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give a folder to another user")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = PrefixDisk(tmp_path, "model", 10**9).folder
    os.chown(folder, 65534, 65534)
    with pytest.raises(RequestError, match="belongs to another user"):
        PrefixDisk(tmp_path, "model", 10**9)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    PrefixDisk(tmp_path, "model", 10**9).folder.chmod(mode)
    with pytest.raises(RequestError, match=f"{mode:o}"):
        PrefixDisk(tmp_path, "model", 10**9)


def test_evicted_nodes_keep_no_memory_while_they_wait_to_be_saved(tmp_path: Path) -> None:
    probe = PrefixStore(10**9)
    put(probe, some(30, 100))
    store = PrefixStore(3 * probe.nbytes, PrefixDisk(tmp_path, "model", 10**9))
    alive: weakref.WeakSet[Node] = weakref.WeakSet()
    for i in range(12):
        put(store, some(31 + i, 100))
        alive.update(store.nodes())
    gc.collect()
    assert len(alive) == len(store) < 12


def test_what_waits_to_be_saved_waits_once(tmp_path: Path) -> None:
    store = saved_store(tmp_path)
    for n in range(20, 80, 2):
        put(store, some(30, n))
    assert len(store._unsaved) == len(store)


def test_pinned_prefixes_age_beyond_their_share() -> None:
    probe = PrefixStore(10**9)
    put(probe, some(30, 100))
    store = PrefixStore(4 * probe.nbytes)
    for i in range(12):
        put(store, some(31 + i, 100), pinned=100)
    put(store, some(60, 100))
    assert store.common(some(60, 100)) == 100


def test_a_full_disk_drops_what_nothing_continues_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "SPAN", 40)
    disk = PrefixDisk(tmp_path, "model", 10**9)
    store = PrefixStore(10**9, disk)
    system = some(80, 40)
    for i in range(5):
        put(store, np.concatenate([system, some(81 + i, 80)]))
    while store.save():
        pass
    disk.limit = sum(p.stat().st_size for p in tmp_path.glob("*/*.prefix")) // 2
    disk.trim()
    assert saved_store(tmp_path).common(system) == 40


def test_a_full_disk_keeps_what_is_used_from_memory(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path, "model", 10**9)
    store = PrefixStore(10**9, disk)
    for seed in (80, 81, 82):
        put(store, some(seed, 80))
    while store.save():
        pass
    paths = sorted(tmp_path.glob("*/*.prefix"))
    for path in paths:
        os.utime(path, (0, 0))
    store.match(some(80, 80))
    disk.limit = max(path.stat().st_size for path in paths)
    disk.trim()
    assert saved_store(tmp_path).common(some(80, 80)) == 80


def test_the_disk_limit_counts_files_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = PrefixDisk(tmp_path, "model", 100)
    (disk.folder / "damaged.prefix").write_bytes(b"x" * 101)
    disk.trim()
    assert [p.name for p in disk.folder.iterdir()] == ["key"] and not caplog.text


def test_what_is_read_from_disk_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "SPAN", 16)
    first = saved_store(tmp_path)
    for seed in range(90, 96):
        put(first, some(seed, 160))
    while first.save():
        pass
    limit = first.nbytes // 3
    store = PrefixStore(limit, PrefixDisk(tmp_path, "model", 10**9))
    held: list[int] = []
    read = PrefixDisk.read

    def watched(disk: PrefixDisk, path: Path) -> Span | None:
        held.append(store.nbytes)
        return read(disk, path)

    monkeypatch.setattr(PrefixDisk, "read", watched)
    for seed in range(90, 96):
        assert store.match(some(seed, 160)).length == 160
        held.append(store.nbytes)
    assert max(held) <= limit


def test_a_path_larger_than_memory_is_read_as_far_as_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "SPAN", 16)
    first = saved_store(tmp_path)
    put(first, some(90, 160))
    while first.save():
        pass
    limit = first.nbytes // 2
    store = PrefixStore(limit, PrefixDisk(tmp_path, "model", 10**9))
    assert 0 < store.match(some(90, 160)).length < 160 and store.nbytes <= limit
    put(store, some(90, 160))
    assert store.nbytes <= limit
    assert store.common(some(90, 160)) == 160 == saved_store(tmp_path).common(some(90, 160))
    assert sum(1 for n in store.nodes() if not n.start) == 1


def test_a_node_that_cannot_be_written_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved_store(tmp_path)
    put(store, some(80, 80))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        while store.save():
            pass
    assert not list(tmp_path.glob("*/*.p*"))
    put(store, np.concatenate([some(80, 80), some(81, 20)]))
    while store.save():
        pass
    assert saved_store(tmp_path).common(np.concatenate([some(80, 80), some(81, 20)])) == 100


def test_a_process_does_not_take_away_what_another_is_writing(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path, "model", 10**9)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = os.getppid()
    fresh, old, dead = (disk.folder / f"{n}.partial" for n in (f"a.{alive}", f"b.{alive}", f"c.{ended.pid}"))
    for partial in (fresh, old, dead):
        partial.touch()
    os.utime(old, (0, 0))
    PrefixDisk(tmp_path, "model", 10**9)
    assert fresh.exists() and not old.exists() and not dead.exists()


def test_a_prefix_cache_that_cannot_be_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="prefix_cache is") as told:
        PrefixDisk(tmp_path / "file", "model", 10**9)
    assert told.value.field == "prefix_cache"


def test_kept_prefixes_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = PrefixDisk(tmp_path / "kept", "model", 10**9).folder
    assert {p.stat().st_mode & 0o777 for p in (folder, folder.parent)} == {0o700}
    store = saved_store(tmp_path / "kept")
    put(store, some(80, 80))
    while store.save():
        pass
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("where", [slice(None), slice(0, 64), slice(-64, None)], ids=["all", "head", "tail"])
def test_a_model_that_differs_in_one_matrix_has_another_fingerprint(tmp_path: Path, where: slice) -> None:
    folder = write_checkpoint(tmp_path, SHAPE)
    before = fingerprint(folder, mx.float32, (None, None))
    assert fingerprint(folder, mx.float32, (None, None)) == before
    tensor = read_folder(folder)["model.layers.1.self_attn.q_proj.weight"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.start)
        data = np.frombuffer(file.read(tensor.nbytes), np.uint8).copy()
        data[where] ^= 1
        file.seek(tensor.start)
        file.write(data.tobytes())
    assert fingerprint(folder, mx.float32, (None, None)) != before


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
from tests.engine.test_prefix import put, saved_store, some
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
    root = str(Path(__file__).parents[2])
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
