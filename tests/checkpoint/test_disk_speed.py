"""Rates of a disk: every read is of a place of its own, where the file has enough of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlx_gptoss.checkpoint.disk_speed import read_rates, scratch_rates


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where was read."""
    seen: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        seen.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def test_no_place_is_read_twice_at_one_depth(tmp_path: Path, places: list[int]) -> None:
    rates = scratch_rates(tmp_path, 1000, (1, 4), reads=10)
    assert set(rates) == {1, 4} and all(rate > 0 for rate in rates.values())
    whole = list(range(0, 10_000, 1000))
    assert sorted(places[:10]) == sorted(places[10:]) == whole
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_is_read_as_often(tmp_path: Path, places: list[int]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2500))
    assert set(read_rates(file, 1000, (2,), reads=7)) == {2}
    assert len(places) == 7 and set(places) <= {0, 1000}


def test_what_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_rates(tmp_path / "gone", 1000)
    with pytest.raises(FileNotFoundError):
        scratch_rates(tmp_path / "gone", 1000)
