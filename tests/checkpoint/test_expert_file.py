"""Reading experts: what can go wrong with files in use ends in a CheckpointError that names them."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.checkpoint.expert_file import ExpertFiles, converted
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.errors import CheckpointError
from mlx_gptoss.model.graph import Model
from tests.model.test_parity import feed
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import Shape

SHAPE = Shape(layers=2, hidden=64, intermediate=64, experts=8, heads=4, vocab=100)
TOKENS = np.arange(24) % SHAPE.vocab
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, SHAPE, shards=1)


def load(folder: Path, slots: int = 4, **options: object) -> Model:
    checkpoint = Checkpoint(folder, "float32")
    checkpoint.streaming = ExpertFiles(checkpoint, slots, **options)  # type: ignore[arg-type]
    return read_model(checkpoint)


def reference(folder: Path) -> np.ndarray:
    return feed(read_model(Checkpoint(folder, "float32")), TOKENS, [len(TOKENS)])


class Disk:
    """A disk whose reads fail while it is broken, and that reads a few bytes at a time."""

    def __init__(self, at_once: int | None = None) -> None:
        self.broken, self.reads, self.at_once = False, 0, at_once

    def preadv(self, descriptor: int, into: Sequence[memoryview], offset: int) -> int:
        self.reads += 1
        if self.broken and self.reads % 40 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, [into[0][: self.at_once]] if self.at_once else into, offset)


def test_an_error_of_the_disk_is_told_and_the_next_run_is_right(folder: Path) -> None:
    disk = Disk()
    model, expected = load(folder, preadv=disk.preadv), reference(folder)
    disk.broken = True
    for _ in range(4):
        with pytest.raises(CheckpointError, match=r"(expert|row) \d+ of .* cannot be read: Input"):
            feed(model, TOKENS, [len(TOKENS)])
    disk.broken = False
    assert np.array_equal(feed(model, TOKENS, [len(TOKENS)]), expected)


def test_reads_that_come_in_pieces_are_put_together(folder: Path) -> None:
    disk = Disk(at_once=100)
    assert np.array_equal(feed(load(folder, preadv=disk.preadv), TOKENS, [24]), reference(folder))


def test_a_file_that_is_cut_short_is_told(folder: Path) -> None:
    model = load(folder)
    with (folder / FILE).open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(CheckpointError, match="cut short while in use|changed while in use"):
        feed(model, TOKENS, [len(TOKENS)])


def test_a_file_that_is_written_to_is_told(folder: Path) -> None:
    model = load(folder)
    with (folder / FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(folder / FILE, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while in use: load the model again"):
        feed(model, TOKENS, [len(TOKENS)])


def test_a_file_that_is_replaced_or_removed_stays_what_it_was(folder: Path, tmp_path: Path) -> None:
    expected, model = reference(folder), load(folder)
    other = write_checkpoint(tmp_path / "other", SHAPE, shards=1, seed=5)
    os.replace(other / FILE, folder / FILE)
    assert np.array_equal(feed(model, TOKENS, [len(TOKENS)]), expected)
    (folder / FILE).unlink()
    assert np.array_equal(feed(model, TOKENS[::-1].copy(), [24])[:1], feed(model, TOKENS[::-1][:1], [1]))


def test_a_file_that_is_another_one_by_the_time_it_is_opened_is_told(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder, "float32")
    shape = Shape(**{**vars(SHAPE), "experts": 6})
    other = write_checkpoint(tmp_path / "other", shape, shards=1)
    os.replace(other / FILE, folder / FILE)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        ExpertFiles(checkpoint, 4)


def test_a_scale_that_is_no_number_is_told_when_it_is_read(folder: Path) -> None:
    checkpoint = Checkpoint(folder, "float32")
    tensor = checkpoint.tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.end - 1)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="expert 7 of .*down_proj_scales holds NaN"):
        feed(load(folder), TOKENS, [len(TOKENS)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_floats_are_converted_as_mlx_converts_them(stored: str, dtype: mx.Dtype) -> None:
    kinds = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    raw = {2: mx.uint16, 4: mx.uint32}
    values = mx.array(np.random.default_rng(0).standard_normal(4000).astype(np.float32)).astype(kinds[stored])
    data = np.array(values.view(raw[values.dtype.size])).view(np.uint8)
    expected = values.astype(dtype)
    found = converted(data, stored, dtype)
    assert np.array_equal(found, np.array(expected.view(raw[dtype.size])).view(np.uint8))


def test_files_are_closed_when_the_model_is_forgotten(folder: Path) -> None:
    def open_files() -> int:
        return sum(
            os.readlink(f"/proc/self/fd/{fd}").endswith(FILE)
            for fd in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{fd}")
        )

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    gc.collect()
    before = open_files()
    model = load(folder)
    feed(model, TOKENS, [len(TOKENS)])
    assert open_files() == before + 1
    del model
    assert open_files() == before
