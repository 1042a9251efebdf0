"""A part of every layer on each host: the logits of one process but for rounding, and the same tokens."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.checkpoint.hub import resolve
from mlx_gptoss.checkpoint.part import part_config
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.distributed.collective import free_port, ipv4_addresses, shared_addresses
from mlx_gptoss.distributed.group import Group, Patience
from mlx_gptoss.distributed.hosts import Host
from mlx_gptoss.distributed.launch import Spread, require_gain, spread_tensor
from mlx_gptoss.distributed.plan import Machine
from mlx_gptoss.distributed.runner import PipelineRunner
from mlx_gptoss.distributed.session import Member
from mlx_gptoss.distributed.stage import PartStage, Stage
from mlx_gptoss.distributed.tensor import TensorRunner
from mlx_gptoss.engine.runner import LocalRunner, ModelRunner
from mlx_gptoss.errors import HostError, RequestError
from mlx_gptoss.llm import LLM
from mlx_gptoss.model.cache import KVBits
from mlx_gptoss.model.sequence_cache import SequenceCache, WindowState
from mlx_gptoss.sampling import SamplingParams
from tests.distributed.test_faults import pids, until
from tests.distributed.test_pipeline import answered_with_disk, played, scheduler
from tests.support.adapters import random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.groups import tensor
from tests.support.random_weights import Shape
from tests.support.scheduling import Client, prompt

DEMO = resolve("demo")  # 2 KV heads, 6 groups of 32 columns
WIDE = Shape(layers=2, hidden=64, intermediate=160, experts=4, heads=8, kv_heads=4, window=16, vocab=160)


def local(kv_bits: KVBits = (None, None), folder: Path = DEMO) -> LocalRunner:
    return LocalRunner(read_model(Checkpoint(folder)), kv_bits)


def fed(runner: ModelRunner) -> np.ndarray:
    """Logits of a prompt, of a single token, and of others after a rewind and in a batch, end to end."""
    tokens = np.array(prompt(5, 40, runner.vocab_size), np.int32)
    one, other = runner.make_cache(), runner.make_cache()
    found = [runner.forward(mx.array(tokens[:24]), [(24, one)])]
    found.append(runner.forward(mx.array(tokens[24:25]), [(1, one)]))
    again = one.rewind(22)
    assert runner.forward(mx.array(tokens[again:24]), [(24 - again, one)], []) is None
    mixed = mx.array(tokens[[24, 25, 0, 1, 2]])
    found.append(runner.forward(mixed, [(2, one), (3, other)], [1, 2, 4]))
    return np.concatenate([np.array(logits) for logits in found])


def difference(runner: ModelRunner, one: ModelRunner) -> float:
    """The largest difference between their logits, relative to these' scale."""
    wanted = fed(one)
    return float(np.abs(fed(runner) - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def two() -> Iterator[PipelineRunner]:
    """The demo model on two hosts, of which the first has one group of columns of six."""
    with tensor(DEMO, 2, (1, 5)) as runner:
        yield runner


def test_logits_of_two_hosts_are_those_of_one_process(two: PipelineRunner) -> None:
    assert difference(two, local()) <= 1e-5
    assert [rank.layers for rank in two.rank_stats()] == [0, 4, 4]


def test_logits_of_three_hosts_of_which_one_has_no_heads_are_those_of_one_process() -> None:
    with tensor(DEMO, 3) as runner:
        assert difference(runner, local()) <= 1e-5


def test_mixed_requests_get_the_tokens_of_one_process(two: PipelineRunner) -> None:
    whole = played(scheduler(local(), message_start=7), 5, 6)
    parts = played(scheduler(two, message_start=7), 5, 6)
    assert parts[1].counters == whole[1].counters
    for (found, found_end), (wanted, wanted_end) in zip(parts[0], whole[0], strict=True):
        assert [token for token, _ in found] == [token for token, _ in wanted]
        assert found_end == wanted_end
    assert whole[1].counters.cached_tokens


def test_prefixes_on_disk_are_those_of_one_process(two: PipelineRunner, tmp_path: Path) -> None:
    tokens = prompt(3, 80, 2000)

    def answer(runner: ModelRunner, folder: Path) -> Client:
        return answered_with_disk(runner, folder, tokens, 2)

    first, again = answer(local(), tmp_path / "one"), answer(two, tmp_path / "one")
    other, last = answer(two, tmp_path / "two"), answer(local(), tmp_path / "two")
    assert first.tokens == again.tokens == other.tokens == last.tokens
    assert (other.done.cached_tokens, again.done.cached_tokens, last.done.cached_tokens) == (0, 79, 79)


@pytest.mark.parametrize("kv_bits", [(None, None), (8, 4)])
def test_what_caches_hold_is_divided_by_heads_and_put_together_again(kv_bits: KVBits) -> None:
    model = read_model(Checkpoint(DEMO))
    machines = [Machine("mac", 1 << 31)] * 5
    shares = spread_tensor(Checkpoint(DEMO), machines, 0, 0, None).shares  # four, of which two have no heads
    runner = TensorRunner(cast(Group, None), model, shares, kv_bits)
    whole, config = SequenceCache(model.config, model.dtype, kv_bits), model.config
    key = mx.random.normal((1, config.num_kv_heads, 9, config.head_dim))
    for layer in whole.layers:
        layer.update_and_fetch(key, key * 2)
    whole.advance(9)
    (span,), state = whole.export([(0, 9)]), whole.copy_window(2, 9)
    assert state.data is not None
    spans, states = runner.divide_span(span), runner.divide_state(state.data)
    for rank, share in enumerate(shares, start=1):
        part = PartStage(
            part_config(config, share.heads, share.channels),
            model.dtype,
            [],
            range(4),
            kv_bits,
            interleaved=True,
        )
        part.make(0, 0)
        part.adopt_span(0, spans[rank])
        part.load(0, [0], 9)
        assert part.caches[0].takes(WindowState(2, 9, states[rank][0]))
    assert all(mx.array_equal(a, b) for a, b in zip(runner.join_span(spans), span, strict=True))
    assert mx.array_equal(runner.join_state(states), state.data)


def test_a_part_that_is_lost_is_started_again() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=())
    question, hosts = prompt(2, 30, 2000), ["localhost", "localhost"]
    patience, others = Patience(silence=120.0, start=300.0), pids()
    with mlx_gptoss.load(
        "demo", max_context=1024, hosts=hosts, parallel="tensor", force=True, patience=patience
    ) as llm:
        wanted = list(llm.generate(question, greedy))
        parts = {*pids()} - {*others}
        assert len(parts) == 2
        os.kill(max(parts), signal.SIGKILL)
        until(lambda: not parts & {*pids()})
        until(lambda: answered(llm, question, greedy) == wanted)
    assert pids() == others


def answered(llm: LLM, question: list[int], params: SamplingParams) -> list[int] | None:
    """The answer, None while the group is not complete."""
    try:
        return list(llm.generate(question, params))
    except HostError as error:
        assert error.retry_after
        return None


def test_adapters_are_refused(two: PipelineRunner) -> None:
    adapter = random_adapter(Checkpoint(DEMO).config, 4, (0, 1), 1)
    with pytest.raises(RequestError, match="adapters do not run in tensor parallelism"):
        two.put_adapter(1, adapter)


def plan(**facts: list[float]) -> tuple[Spread, list[Member]]:
    """A plan over two hosts, and what they would have measured."""
    machines = [Machine("mac1", 1 << 31)] * 2 + [Machine("mac2", 1 << 32)]
    made = spread_tensor(Checkpoint(DEMO), machines, 0, 0, None)
    members = [SimpleNamespace(facts={name: two[i] for name, two in facts.items()}) for i in (0, 1)]
    return made, cast("list[Member]", members)


def test_sums_that_cost_more_than_they_save_are_refused_with_what_was_measured() -> None:
    require_gain(*plan(step=[0.006, 0.006], all_sum=[50e-6, 60e-6]))
    with pytest.raises(
        RequestError, match=r"the 8 all_sums of a token take 16\.00 ms \(2000 us each\)"
    ) as error:
        require_gain(*plan(step=[0.006, 0.006], all_sum=[50e-6, 2e-3]))
    assert error.value.field == "parallel"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parallel": "expert"}, "parallel is 'expert': expected 'pipeline' or 'tensor'"),
        ({"parallel": "tensor", "split": (1, 1)}, "split is 1,1: expected 2 counts .* 6 in all"),
    ],
)
def test_what_is_asked_for_wrongly_is_told_before_anything_is_read(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        mlx_gptoss.load("demo", hosts=["localhost", "localhost"], **options)


LAN, CABLE = "192.168.1.{}/24", "10.0.5.{}/30"


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        ([("", "127.0.0.1", []), ("", "127.0.0.1", [])], ["127.0.0.1", "127.0.0.1"]),
        # The part beside rank 0 reached it at home; the other one over IPv6, as Bonjour has it.
        (
            [("", "127.0.0.1", [LAN.format(2), CABLE.format(1)]), ("", "fe80::1%en0", [LAN.format(3)])],
            ["192.168.1.2", "192.168.1.3"],
        ),
        ([("10.0.5.1", "127.0.0.1", []), ("10.0.5.2", "fe80::1%en0", [])], ["10.0.5.1", "10.0.5.2"]),
        (
            [("", "127.0.0.1", [LAN.format(2)]), ("", "192.168.1.3", [LAN.format(3)])],
            ["192.168.1.2", "192.168.1.3"],
        ),
    ],
)
def test_parts_meet_at_addresses_that_all_reach(
    ranks: list[tuple[str, str, list[str]]], wanted: list[str]
) -> None:
    asked = [(Host(f"mac{i}", (ip,) if ip else ()), seen, own) for i, (ip, seen, own) in enumerate(ranks)]
    assert ipv4_addresses(asked) == wanted


def test_only_networks_that_both_are_in_are_shared() -> None:
    assert shared_addresses([LAN.format(2), CABLE.format(2)], [LAN.format(3)]) == [LAN.format(2)[:-3]]


def test_parts_without_a_common_network_are_told_what_to_give() -> None:
    asked = [(Host("mac1"), "127.0.0.1", [LAN.format(2)]), (Host("mac2"), "fe80::1%en0", [CABLE.format(2)])]
    with pytest.raises(
        HostError, match="mac1 has no IPv4 address in a network that all hosts are in: give `ips`"
    ):
        ipv4_addresses(asked)


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX's CPU backend compiles with a C++ compiler")
def test_parts_are_replayed_on_a_gpu_as_whole_layers_are(tmp_path: Path) -> None:
    folder, ports = write_checkpoint(tmp_path, WIDE), [str(free_port()) for _ in range(2)]
    command = [sys.executable, "-m", "tests.support.replayed_part", str(folder)]
    parts = [
        subprocess.Popen([*command, str(rank), *ports], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    for part in parts:
        told = json.loads(part.communicate(timeout=150)[0])
        assert told["difference"] <= 1e-5
        assert told["built"] == 2 * WIDE.layers  # once for the prompt, once for the first single token


def test_a_lost_peer_is_an_error_of_hosts_and_others_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = part_config(Checkpoint(DEMO).config, range(1), range(32))
    part = PartStage(config, mx.float32, [], range(4), (None, None), interleaved=True)
    for told, kind in (("[ring] connection to a peer was lost", HostError), ("out of memory", RuntimeError)):

        def failing(*_: object, told: str = told) -> None:
            raise RuntimeError(told)

        monkeypatch.setattr(Stage, "forward", failing)
        with pytest.raises(kind, match=re.escape(told)):
            part.forward(mx.zeros((1, config.hidden_size)), [], None)
