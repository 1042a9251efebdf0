"""What the converter's writer puts into files, whichever way it goes to the disk."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from mlx_gptoss.convert import writer as module
from mlx_gptoss.convert.jobs import Output
from mlx_gptoss.convert.tensors import Extent
from mlx_gptoss.convert.writer import ShardWriter, lay_out
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.files import BLOCK

# In the order of the file: less than a block, several, one that ends inside a block, many.
SIZES = (100, 3 * BLOCK, 2 * BLOCK + 7, 11 * BLOCK + 5, BLOCK)
DATA = np.random.default_rng(0).integers(0, 256, 40 * BLOCK, np.uint8).tobytes()
STARTS = (1, 7, 5000, 0, 9)  # where the copies begin in their source


def copied(folder: Path, *, past_cache: bool) -> bytes:
    """The data of a shard of tensors that are copied out of another file."""
    (folder / "source").write_bytes(DATA)
    outputs = [Output(f"t{i}", "U8", (size,)) for i, size in enumerate(SIZES)]
    layout = lay_out(outputs, 1 << 30)
    with ShardWriter(folder, layout, lambda: None, past_cache=past_cache) as writer:
        for output, start in zip(outputs, STARTS, strict=True):
            told: list[int] = []
            watch = writer.copy(output.name, Extent(folder / "source", start, output.nbytes), told.append)
            assert watch.sha256 == hashlib.sha256(DATA[start : start + output.nbytes]).hexdigest()
            assert writer.read_back(output.name).sha256 == watch.sha256
            assert sum(told) == output.nbytes
        writer.sync()
    (shard,) = layout.shards
    content = (folder / shard.name).read_bytes()
    assert content[: len(shard.header)] == shard.header
    return content[len(shard.header) :]


EXPECTED = b"".join(DATA[start : start + size] for start, size in zip(STARTS, SIZES, strict=True))


@pytest.mark.parametrize("at_once", [BLOCK, 4 * BLOCK, 1 << 22])
@pytest.mark.parametrize("past_cache", [False, True])
def test_copies_are_the_source_s_bytes(
    tmp_path: Path, past_cache: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COPY_BYTES", at_once)
    assert copied(tmp_path, past_cache=past_cache) == EXPECTED


def test_reads_that_come_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: preadv(fd, [into[0][:5003]], offset))
    assert copied(tmp_path, past_cache=True) == EXPECTED


def test_a_disk_that_wants_larger_blocks_gets_them_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refusing(monkeypatch, errno.EINVAL)
    assert copied(tmp_path, past_cache=True) == EXPECTED
    assert refused


def test_a_write_that_stops_in_the_middle_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: len(data) // 2 or 1], offset)
    )
    assert copied(tmp_path, past_cache=True) == EXPECTED


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, errno.ENOSPC)
    with pytest.raises(ConversionError, match="the disk is full; free some space") as error:
        copied(tmp_path, past_cache=True)
    assert "\n" not in str(error.value)


def refusing(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    """Let every write of whole blocks fail; the offsets of those that did."""
    refused: list[int] = []
    pwrite = os.pwrite

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) >= BLOCK and offset % BLOCK == 0 and not refused:
            refused.append(offset)
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    return refused
