"""Requests on a model whose experts are read from the disk: the same tokens, whatever goes on."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss import llm as llm_module
from mlx_gptoss.checkpoint.adapter import write_adapter
from mlx_gptoss.checkpoint.expert_file import ExpertFiles
from mlx_gptoss.checkpoint.memory import plan
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.engine import pressure as pressure_module
from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.engine.pressure import Pressure
from mlx_gptoss.engine.request import TokensDone
from mlx_gptoss.engine.runner import LocalRunner, streamed_experts
from mlx_gptoss.errors import CheckpointError, MemoryLimitError, RequestError
from mlx_gptoss.llm import LLM, load
from mlx_gptoss.model.graph import Model
from mlx_gptoss.sampling import PromptProgress, SamplingParams
from tests.support.adapters import random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape
from tests.support.scheduling import Client, make, prompt, run

SHAPE = Shape(layers=3, hidden=64, intermediate=64, experts=16, heads=4, window=16, vocab=300)
SIX = 6 * 3 * 7296  # bytes of six slots in each of the three layers
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("streaming"), SHAPE)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Iterator[LLM]:
    with load(folder, prefill_chunk=32) as llm:
        yield llm


def slots_of(llm: LLM) -> int:
    layers = llm.engine.scheduler.runner.streamed  # type: ignore[attr-defined]
    return layers[0].slots.count if layers else SHAPE.experts


def streamed_model(folder: Path, slots: int) -> Model:
    checkpoint = Checkpoint(folder, "float32")
    checkpoint.streaming = ExpertFiles(checkpoint, slots)
    return read_model(checkpoint)


class Disk:
    """A disk that fails some reads while it is broken."""

    def __init__(self) -> None:
        self.broken = False

    def preadv(self, descriptor: int, into: Sequence[memoryview], offset: int) -> int:
        if self.broken and len(into[0]) > 1000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, into, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(llm_module, "ExpertFiles", partial(ExpertFiles, preadv=made.preadv))
    return made


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"draft": "lookup"}, {"prefill_chunk": 16}])
def test_requests_get_the_tokens_of_a_model_in_memory(folder: Path, options: dict[str, object]) -> None:
    """One after another, together, and with a prefix in common."""
    asked = [prompt(i, 20 + 7 * i) for i in range(3)] + [prompt(2, 34) + prompt(9, 5)]
    found = []
    for memory in ("all", SIX):
        chosen: dict[str, object] = {"prefill_chunk": 32, **options, "expert_memory": memory}
        with load(folder, **chosen) as llm:  # type: ignore[arg-type]
            alone = [list(llm.generate(p, GREEDY)) for p in asked]
            streams = [llm.submit(p[::-1], GREEDY) for p in asked]
            found.append((alone, [[o.token_id for o in s] for s in streams]))
    assert found[0] == found[1]


def test_logits_are_the_same(folder: Path, resident: LLM) -> None:
    """To the bit for a token; of a long prompt the head takes all rows at once in a sweep, and a BLAS adds in
    an order that depends on their number.
    """
    tokens = prompt(1, 100)
    with load(folder, prefill_chunk=32, expert_memory=SIX) as llm:
        assert slots_of(llm) == 6
        assert np.array_equal(llm.logits(tokens[:1]), resident.logits(tokens[:1]))
        assert np.allclose(llm.logits(tokens), resident.logits(tokens), rtol=0, atol=1e-5)


def test_an_adapter_of_streamed_experts_is_that_of_experts_in_memory(folder: Path, tmp_path: Path) -> None:
    """Of attention, router and experts, for a prompt that is swept layer by layer and for decoding."""
    config = Checkpoint(folder).config
    write_adapter(tmp_path, random_adapter(config, 4, (0, 1, 2)), config)
    tokens = prompt(5, 120)
    with load(folder, adapter=tmp_path) as one:
        expected, said = one.logits(tokens), list(one.generate(tokens, GREEDY))
        assert np.abs(expected - one.logits(tokens, adapter="base")).max() > 0.1
    with load(folder, adapter=tmp_path, expert_memory=SIX) as streamed:
        assert slots_of(streamed) < SHAPE.experts
        assert np.array_equal(streamed.logits(tokens), expected)
        assert list(streamed.generate(tokens, GREEDY)) == said


def test_many_requests_with_few_slots_come_to_the_right_end(folder: Path) -> None:
    """Eight at a time choose more experts than there are slots: they take turns."""
    models = [streamed_model(folder, 6), read_model(Checkpoint(folder, "float32"))]
    found = []
    for model in models:
        scheduler = make(model, budget=1 << 26)
        clients = [
            Client(scheduler, prompt(i, random.Random(i).randrange(1, 12)), max_tokens=3) for i in range(64)
        ]
        run(scheduler)
        found.append([c.tokens for c in clients])
        assert all(c.done.finish_reason == "length" for c in clients)
    assert found[0] == found[1]


def test_no_more_requests_run_at_a_time_than_find_slots(folder: Path) -> None:
    for memory, running in ((SIX, 1), (2 * SIX, 3), ("all", 16)):
        with load(folder, expert_memory=memory) as llm:
            assert llm.engine.options.max_running == running


def test_a_broken_disk_fails_a_request_in_one_line_and_the_next_one_is_right(
    folder: Path, resident: LLM, disk: Disk
) -> None:
    with load(folder, expert_memory=SIX) as llm:
        for seed in range(3):
            disk.broken = True
            streams = [llm.submit(prompt(seed + i, 30), GREEDY) for i in range(4)]
            for stream in streams:
                with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error") as error:
                    list(stream)
                assert "\n" not in str(error.value)
            disk.broken = False
            assert list(llm.generate(prompt(seed, 30), GREEDY)) == list(
                resident.generate(prompt(seed, 30), GREEDY)
            )
        assert llm.stats().failed == 12


def test_how_far_a_long_prompt_is_read_is_told_layer_by_layer(folder: Path) -> None:
    told: list[object] = []
    with load(folder, expert_memory=SIX, prefill_chunk=32) as llm:
        ended = threading.Event()

        def sink(item: object) -> None:
            told.append(item)
            if isinstance(item, TokensDone):
                ended.set()

        llm.engine.submit(prompt(1, 90), GREEDY, sink=sink, progress=sink)
        assert ended.wait(30)
    read = [item.read_tokens for item in told if isinstance(item, PromptProgress)]
    assert read == [0, 30, 60, 90]


def test_what_was_read_is_counted(folder: Path) -> None:
    with load(folder, expert_memory=SIX) as llm:
        assert llm.stats().expert_hit_rate is None
        list(llm.generate(prompt(1, 30), GREEDY))
        stats = llm.stats()
        assert stats.expert_hits + stats.expert_misses >= 3 * 4 * 8
        assert len(stats.expert_layers) == 3
        assert stats.expert_misses == sum(c.misses for c in stats.expert_layers)
        assert stats.expert_read_bytes == stats.expert_misses * (3 * 64 * 64 * 17 // 32)
        assert stats.expert_read_seconds > 0 and stats.expert_wait_seconds > 0
        assert stats.expert_hit_rate == stats.expert_hits / (stats.expert_hits + stats.expert_misses)


def test_drafts_are_made_only_while_experts_are_at_hand(folder: Path) -> None:
    repeated = prompt(1, 8) * 6
    for memory, drafts in ((SIX, False), ("all", True)):
        with load(folder, expert_memory=memory, draft="lookup") as llm:
            list(llm.generate(repeated, GREEDY))
            list(llm.generate(repeated, GREEDY))
            assert bool(llm.stats().drafted_tokens) is drafts


def test_the_favourites_of_one_process_are_in_memory_in_the_next(folder: Path, tmp_path: Path) -> None:
    rates = []
    for _ in range(2):
        with load(folder, expert_memory=SIX, prefix_cache=tmp_path) as llm:
            layers = llm.engine.scheduler.runner.streamed  # type: ignore[attr-defined]
            rates.append([len(e.slots.held) for e in layers])
            list(llm.generate(prompt(1, 3), GREEDY))
    assert rates == [[0, 0, 0], [6, 6, 6]]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"x" * 100])
def test_a_file_of_favourites_that_cannot_be_used_is_passed_over(
    folder: Path, tmp_path: Path, content: bytes, resident: LLM
) -> None:
    with load(folder, expert_memory=SIX, prefix_cache=tmp_path) as llm:
        list(llm.generate(prompt(1, 3), GREEDY))
    (path,) = tmp_path.glob("*/experts.npy")
    path.write_bytes(content)
    with load(folder, expert_memory=SIX, prefix_cache=tmp_path) as llm:
        assert list(llm.generate(prompt(2, 9), GREEDY)) == list(resident.generate(prompt(2, 9), GREEDY))


def test_one_line_tells_what_is_where(folder: Path) -> None:
    lines: list[str] = []
    load(folder, expert_memory=SIX, announce=lines.append).close()
    load(folder, announce=lines.append).close()
    assert "6 of 16 experts a layer in memory" in lines[0] and "\n" not in lines[0]
    assert "experts" not in lines[1]


@pytest.mark.parametrize("value", ["", "much", "12 parsecs", 0, -1, 1.5, None, True])
def test_an_amount_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match="expert_memory is .* expected 'auto', 'all', or a size"):
        EngineOptions(expert_memory=value)  # type: ignore[arg-type]


def test_sizes_are_given_as_text_or_number(folder: Path) -> None:
    for memory in (f"{SIX}", SIX, f"{SIX / 1000}kB"):
        with load(folder, expert_memory=memory) as llm:
            assert slots_of(llm) == 6
    with pytest.raises(MemoryLimitError, match="a token needs 4 experts in each layer"):
        load(folder, expert_memory="1kB")


def test_a_model_that_does_not_fit_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = 3_500_000
    enough = plan(folder).total() + llm_module.SCRATCH + kv
    monkeypatch.setattr(llm_module, "available_memory", lambda: enough - 100_000)
    with load(folder, kv_budget=kv, max_context=64) as llm:
        assert 4 <= slots_of(llm) < SHAPE.experts
        list(llm.generate(prompt(1, 9), GREEDY))
    monkeypatch.setattr(llm_module, "available_memory", lambda: enough)
    with load(folder, kv_budget=kv, max_context=64) as llm:
        assert slots_of(llm) == SHAPE.experts


def test_while_the_system_is_short_of_memory_prefixes_and_then_slots_are_given_back(folder: Path) -> None:
    """And taken again after a while; the tokens stay the same."""
    plain = make(read_model(Checkpoint(folder, "float32")))
    runner = LocalRunner(model := streamed_model(folder, 12), streamed=streamed_experts(model))
    scheduler = make(model)
    clock, short = [0.0], [False]
    pressure = Pressure(lambda: short[0], scheduler.store, runner, lambda: clock[0])

    def after(seconds: float, count: int = 1) -> int:
        for _ in range(count):
            clock[0] += seconds
            pressure.relieve()
            client, same = (Client(s, prompt(int(clock[0]), 9)) for s in (scheduler, plain))
            run(scheduler)
            run(plain)
            assert client.tokens == same.tokens
        return runner.expert_slots

    assert after(100) == 12
    short[0] = True
    assert after(0.1) == 12  # it is not asked that often
    assert [after(1), after(1), after(1, 5)] == [9, 6, 4]
    short[0] = False
    assert [after(30), after(31), after(59), after(2), after(61, 12)] == [4, 5, 5, 6, 12]
    assert all(len(e.slots.held) <= 12 for e in runner.streamed)


def test_prefixes_are_given_back_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure_module, "FEW", 1000)
    scheduler = make(model := streamed_model(folder, 8))
    runner = LocalRunner(model, streamed=streamed_experts(model))
    clock = iter(range(100))
    pressure = Pressure(lambda: True, scheduler.store, runner, lambda: float(next(clock)))
    for seed in range(4):
        Client(scheduler, prompt(seed, 60))
    run(scheduler)
    kept = scheduler.store.nbytes
    pressure.relieve()
    assert kept > 1000 and scheduler.store.nbytes <= kept // 2 and runner.expert_slots == 8
    for _ in range(20):
        pressure.relieve()
    assert scheduler.store.nbytes <= 1000 and runner.expert_slots == 4


def test_a_process_that_is_killed_while_it_reads_leaves_nothing_wrong(
    folder: Path, tmp_path: Path, resident: LLM
) -> None:
    code = (
        "import sys\n"
        "from mlx_gptoss import SamplingParams, load\n"
        f"llm = load(sys.argv[1], expert_memory={SIX}, prefix_cache=sys.argv[2])\n"
        "for output in llm.submit([1, 2, 3], SamplingParams(max_tokens=100_000, stop_token_ids=())):\n"
        "    print(output.token_id, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with load(folder, expert_memory=SIX, prefix_cache=tmp_path) as llm:
        assert list(llm.generate(prompt(4, 9), GREEDY)) == list(resident.generate(prompt(4, 9), GREEDY))
