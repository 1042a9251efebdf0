"""A model over several ranks is the model in one process: the same logits, bit for bit, whatever is asked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.memory import plan_checkpoint, plan_experts
from mlx_gptoss.checkpoint.reader import Checkpoint, Portion, read_layers, read_model
from mlx_gptoss.distributed.launch import spread
from mlx_gptoss.distributed.plan import Machine
from mlx_gptoss.engine.prefix_disk import PrefixDisk
from mlx_gptoss.engine.runner import LocalRunner, ModelRunner, Pending
from mlx_gptoss.engine.scheduler import Scheduler
from mlx_gptoss.engine.speculate import PromptLookup
from mlx_gptoss.model.cache import KVBits
from tests.support.adapters import random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.groups import pipeline
from tests.support.mixed_requests import Script
from tests.support.random_weights import Shape
from tests.support.scheduling import Client, prompt, run

DEMO = resolve("demo")
# So little that sequences are sent back to wait, and prefixes evicted.
BUDGET = 3 << 20


class Recorded:
    """A runner's forwards: what went in, and the logits that came out, as numbers."""

    def __init__(self, runner: ModelRunner) -> None:
        self.logits: list[tuple[list[int], np.ndarray | None]] = []
        self._launch = runner.launch
        runner.launch = self._recorded  # type: ignore[method-assign]

    def _recorded(self, tokens: mx.array, *rest: Any, **more: Any) -> Pending | None:
        out = self._launch(tokens, *rest, **more)
        self.logits.append((np.array(tokens).tolist(), None if out is None else np.array(out.logits())))
        return out


def local(kv_bits: KVBits = (None, None)) -> LocalRunner:
    """The demo model in one process, its matrices in memory as a group has them."""
    checkpoint = Checkpoint(DEMO)
    checkpoint.unpacked = plan_experts(checkpoint, "all", 1 << 40, 0).unpacked
    return LocalRunner(read_model(checkpoint), kv_bits)


def scheduler(runner: ModelRunner, **options: Any) -> Scheduler:
    return Scheduler(runner, **{"budget": BUDGET, "chunk": 64, "max_running": 4, **options})


def played(made: Scheduler, seed: int, count: int) -> tuple[list[Any], Scheduler]:
    """What came of a script: tokens, log-probabilities and ends."""
    clients = Script(made, seed).run(count)
    return [([(o.token_id, o.logprobs) for o in c.outputs], c.done) for c in clients], made


@pytest.mark.parametrize(
    ("ranks", "split", "kv_bits", "options"),
    [
        (2, None, (None, None), {}),
        (3, (1, 1, 2), (8, 4), {"drafters": PromptLookup}),
        (4, None, (None, None), {"message_start": 7}),
    ],
)
def test_mixed_requests_equal_one_process(
    ranks: int, split: Sequence[int] | None, kv_bits: KVBits, options: dict[str, Any]
) -> None:
    one = local(kv_bits)
    expected, whole = Recorded(one), played(scheduler(one, **options), ranks, 8)
    with pipeline(DEMO, ranks, split, kv_bits) as runner:
        runner.hold_depth(1)  # one forward at a time, so that all are the same
        found, parts = Recorded(runner), played(scheduler(runner, **options), ranks, 8)
        assert parts[0] == whole[0]
        assert parts[1].counters == whole[1].counters
        assert len(found.logits) == len(expected.logits)
        for (fed, logits), (wanted, right) in zip(found.logits, expected.logits, strict=True):
            assert fed == wanted
            assert (logits is None) == (right is None)
            assert logits is None or right is None or np.array_equal(logits, right)
        parts[1].close()
    counts = whole[1].counters  # what the scripts are for has happened in them
    assert counts.cached_tokens and (counts.preempted or counts.accepted_tokens or counts.cancelled)


def test_with_a_forward_on_every_rank_each_request_is_what_it_is_alone() -> None:
    one = local()
    with pipeline(DEMO, 3) as runner:
        made = scheduler(runner, max_running=5)
        clients = Script(made, 43).run(10)
        assert made.counters.failed == 0 and made.live_bytes == 0
    for client in clients:
        asked = client.request
        again = Client(
            alone := scheduler(one),
            asked.prompt,
            asked.max_tokens,
            asked.params,
            asked.stop_ids,
            constraint=asked.constraint,
        )
        run(alone)
        whole = client.done.finish_reason != "cancelled"
        assert client.tokens == (again.tokens if whole else again.tokens[: len(client.tokens)])


def test_every_rank_has_a_forward_of_its_own() -> None:
    with pipeline(DEMO, 2) as runner:
        runner.hold_depth(2)
        made = scheduler(runner, budget=1 << 28)
        clients = [Client(made, prompt(i, 40, 2000), 8) for i in range(4)]
        under_way = []
        while made.step():
            under_way.append(sorted(made.running.index(r) for r in made.running if r.flight is not None))
        assert [0, 1] in under_way and [2, 3] in under_way
        assert [client.done.finish_reason for client in clients] == ["length"] * 4
        here, there = made.stats().ranks
        assert (here.layers, there.layers, made.stats().rank_losses) == (2, 2, 0)
        assert here.steps == made.counters.forwards and here.sent_bytes > 0 and here.peak_bytes > 0


def answered_with_disk(runner: ModelRunner, folder: Path, tokens: list[int], count: int) -> Client:
    """A request, ended, whose prefixes are found in a folder and kept there."""
    made = scheduler(runner, disk=PrefixDisk(folder, "demo", 10**9), budget=1 << 28)
    client = Client(made, tokens, count)
    run(made)
    while made.store.save():
        pass
    return client


def test_prefixes_on_disk_are_those_of_one_process(tmp_path: Path) -> None:
    """Written by either, read by the other: a file holds the parts of all layers."""
    tokens = prompt(3, 200, 2000)

    def answer(runner: ModelRunner, folder: Path) -> Client:
        return answered_with_disk(runner, folder, tokens, 6)

    first = answer(local(), tmp_path / "one")
    assert first.done.cached_tokens == 0
    with pipeline(DEMO, 2) as runner:
        again = answer(runner, tmp_path / "one")
        other = answer(runner, tmp_path / "two")
    last = answer(local(), tmp_path / "two")
    assert first.tokens == again.tokens == other.tokens == last.tokens
    assert (other.done.cached_tokens, again.done.cached_tokens, last.done.cached_tokens) == (0, 199, 199)


def test_adapters_of_a_batch_are_on_every_rank(tmp_path: Path) -> None:
    config = Checkpoint(DEMO).config
    adapters = [random_adapter(config, 4, (0, 1, 2, 3), seed) for seed in (1, 2)]

    def answers(runner: ModelRunner) -> list[list[int]]:
        made = scheduler(runner)
        for number, adapter in enumerate(adapters, start=1):
            made.put_adapter(number, adapter)
        clients = [Client(made, prompt(i % 2, 30, 2000), 5, adapter=i % 3) for i in range(6)]
        run(made)
        made.put_adapter(1, adapters[1])
        made.put_adapter(2, None)
        clients.append(Client(made, prompt(9, 30, 2000), 5, adapter=1))
        run(made)
        return [client.tokens for client in clients]

    with pipeline(DEMO, 2) as runner:
        found = answers(runner)
    assert found == answers(local())
    assert len({tuple(tokens) for tokens in found}) == 7


def test_ranks_that_are_short_read_experts_from_the_disk() -> None:
    checkpoint = Checkpoint(DEMO)
    machines = [Machine("here", 1 << 40)] * 2
    needed = [share.needed for share in spread(checkpoint, machines, 1 << 26, 0, None).shares]
    expert = plan_checkpoint(checkpoint).expert.loaded
    tokens = mx.array(prompt(4, 40, 2000), mx.int32)

    def logits(runner: ModelRunner) -> np.ndarray:
        made = runner.forward(tokens, [(len(tokens), runner.make_cache())])
        return np.array(made)

    with pipeline(DEMO, 2, (2, 2), rooms=[n - expert for n in needed]) as runner:
        found = logits(runner)
    assert np.array_equal(found, logits(LocalRunner(read_model(checkpoint))))


def test_a_rank_opens_only_the_files_of_its_layers(tmp_path: Path) -> None:
    """Each has a copy without the others' files."""
    shape = Shape(layers=4, vocab=320)
    folder = write_checkpoint(tmp_path / "whole", shape, shards=6)
    whole = Checkpoint(folder)
    sizes = []
    for layers in (range(2), range(2, 3), range(3, 4)):
        portion = Portion(layers, ends=not layers.start)
        needed = {t.path for n, t in whole.tensors.items() if portion.has(whole.specs[n])}
        partial = tmp_path / f"part {layers.start}"
        shutil.copytree(folder, partial)
        for path in partial.glob("*.safetensors"):
            if path.name not in {n.name for n in needed}:
                path.unlink()
        part = Checkpoint(partial, portion=portion)
        assert len(read_layers(part)) == len(layers)
        assert set(part.tensors) == {n for n in whole.tensors if portion.has(whole.specs[n])}
        sizes.append(len(needed))
    assert max(sizes[1:]) < 6
