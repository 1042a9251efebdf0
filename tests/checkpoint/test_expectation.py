"""What is expected of streaming grows with memory, and is nothing where every expert fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_gptoss.checkpoint.expectation import expected_hits, read_from_disk
from mlx_gptoss.checkpoint.memory import plan_checkpoint
from mlx_gptoss.checkpoint.reader import Checkpoint
from mlx_gptoss.cli.inspect import by_memory
from tests.support.random_weights import SHAPES
from tests.support.sparse_checkpoint import write_sparse


def test_the_curve_goes_through_what_was_published() -> None:
    published = {16: 0.74, 24: 0.82, 32: 0.86, 48: 0.90, 64: 0.92, 128: 1.0}
    assert {n: round(expected_hits(n, 128), 3) for n in published} == published
    curve = [expected_hits(n, 128) for n in range(129)]
    assert curve == sorted(curve)


@pytest.mark.parametrize("name", ["20b", "120b"])
def test_more_memory_means_more_slots_and_less_to_read(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES[name]), "bfloat16")
    plans = [mac["plan"] for mac in by_memory(checkpoint)["macs"]]
    held = [made["experts_in_memory"] for made in plans if made]
    read = [made["read_from_disk_per_token"] for made in plans if made]
    assert held == sorted(held) and held[-1] == SHAPES[name].experts
    assert read == sorted(read, reverse=True) and read[-1] == 0
    assert len(held) >= 7


def test_without_slots_a_token_reads_its_experts_from_the_disk(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_sparse(tmp_path, SHAPES["20b"]), "bfloat16")
    assert read_from_disk(plan_checkpoint(checkpoint)) == 0
    assert read_from_disk(plan_checkpoint(checkpoint, 8)) == pytest.approx(24 * 4 * 13_219_200 * 0.14)
