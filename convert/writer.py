"""Safetensors shards written in place: headers first, then every tensor at its own offset, in any order."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_gptoss.checkpoint.safetensors import TensorInfo
from mlx_gptoss.convert.disk import writing
from mlx_gptoss.convert.finite import Watch
from mlx_gptoss.convert.jobs import Output
from mlx_gptoss.convert.tensors import Extent
from mlx_gptoss.errors import ConversionError
from mlx_gptoss.files import BLOCK, open_past_cache

COPY_BYTES = 1 << 20  # read, hashed and written at a time: stays in a core's cache


@dataclass(frozen=True)
class Shard:
    """A file of the result: its header with the length in front, and its size in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class ShardLayout:
    """Which tensor lies where (its path: the shard's name), and the index where there are several shards."""

    shards: tuple[Shard, ...]
    places: dict[str, TensorInfo]
    index: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)


def lay_out(outputs: Sequence[Output], shard_size: int) -> ShardLayout:
    """Fill shards of at most `shard_size` bytes of data in order; a larger tensor gets a shard to itself."""
    groups: list[list[Output]] = [[]]
    filled = 0
    # Those that lie on pages of their own are in files of their own: a tensor must follow the one before it.
    for output in sorted(outputs, key=lambda output: output.alignment):
        full = filled + output.nbytes > shard_size
        if groups[-1] and (full or output.alignment != groups[-1][-1].alignment):
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    shards: list[Shard] = []
    places: dict[str, TensorInfo] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header = _header(group)
        position = len(header)
        for o in group:
            end = position + o.nbytes
            places[o.name] = TensorInfo(o.name, o.dtype, o.shape, position, end, Path(name))
            position = end
        shards.append(Shard(name, header, position))
    index = None
    if len(groups) > 1:
        total = sum(output.nbytes for output in outputs)
        weight_map = {name: place.path.name for name, place in sorted(places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return ShardLayout(tuple(shards), places, index)


def _header(outputs: Sequence[Output]) -> bytes:
    """The header's length and the header, padded so that the data starts where the outputs are aligned to."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [position, position + output.nbytes],
        }
        position += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % outputs[0].alignment)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """The open shards of a layout, in a folder of unfinished work. Safe to use from several threads.

    `stop` is called between pieces of a long copy and raises to end it. Every method raises ConversionError
    when the disk is full or refuses, and leaves what is written for a later run.

    past_cache: copies go straight to the disk where the system can, which spares it a copy of them in memory,
    and waiting for the disk at the end. What is read again at once is better left there.
    """

    def __init__(
        self, folder: Path, layout: ShardLayout, stop: Callable[[], None], *, past_cache: bool = False
    ) -> None:
        self._folder, self._layout, self._stop, self._past_cache = folder, layout, stop, past_cache
        self._files: dict[str, int] = {}
        self._past: dict[str, int] = {}

    def __enter__(self) -> ShardWriter:
        for shard in self._layout.shards:
            path = self._folder / shard.name
            try:
                with writing(path):
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
                    self._files[shard.name] = descriptor
                    os.ftruncate(descriptor, shard.size)
                    _write_at(descriptor, memoryview(shard.header), 0)
                    if self._past_cache and (past := open_past_cache(path)) is not None:
                        self._past[shard.name] = past
            except ConversionError:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for files in (self._files, self._past):
            for descriptor in files.values():
                os.close(descriptor)
            files.clear()

    def write_rows(self, name: str, first: int, rows: np.ndarray) -> None:
        """Rows of a tensor from row `first`."""
        place = self._layout.places[name]
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._write(place.path.name, data, place.start + first * (len(data) // len(rows)))

    def _write(self, shard: str, data: memoryview, offset: int) -> None:
        with writing(self._folder / shard):
            _write_at(self._files[shard], data, offset)

    def copy(self, name: str, extent: Extent, copied: Callable[[int], None]) -> Watch:
        """Fill a tensor with a run of bytes of another file; a Watch that has seen them.

        `copied` is called with each piece's size.
        """
        place = self._layout.places[name]
        watch, done = Watch(name, place.dtype), 0
        buffer = memoryview(mmap.mmap(-1, COPY_BYTES + BLOCK))  # which begins on a block
        with _open_source(extent.path) as source:
            while done < extent.length:
                self._stop()
                offset = place.start + done
                ahead = offset % BLOCK  # so that whole blocks of the file are whole blocks in memory
                data = buffer[ahead : ahead + min(COPY_BYTES - ahead, extent.length - done)]
                try:
                    count = os.preadv(source.fileno(), [data], extent.start + done)
                except OSError as error:
                    raise _unreadable(extent.path, error) from error
                if not count:
                    raise ConversionError(f"{extent.path}: became shorter while it was being converted")
                watch.see(data[:count])
                self._write_past_cache(place.path.name, data[:count], offset)
                done += count
                copied(count)
        return watch

    def _write_past_cache(self, shard: str, data: memoryview, offset: int) -> None:
        """As `_write`; whole blocks of the file past the cache. They must be whole blocks in memory."""
        past = self._past.get(shard)
        head = -offset % BLOCK
        blocks = (len(data) - head) // BLOCK * BLOCK
        if past is None or blocks <= 0:
            self._write(shard, data, offset)
            return
        body = data[head : head + blocks]
        with writing(self._folder / shard):
            done = _write_blocks(past, body, offset + head)
        self._write(shard, data[:head], offset)
        self._write(shard, data[head + done :], offset + head + done)

    def read_back(self, name: str) -> Watch:
        """A Watch that has seen the tensor's bytes as they are in the file now."""
        place = self._layout.places[name]
        watch = Watch(name, place.dtype)
        self._read(place.path.name, place.start, place.end, watch.see)
        return watch

    def shard_digest(self, shard: Shard) -> str:
        """SHA-256 of a whole shard."""
        digest = hashlib.sha256()
        self._read(shard.name, 0, shard.size, digest.update)
        return digest.hexdigest()

    def _read(self, shard: str, start: int, end: int, see: Callable[[bytes], None]) -> None:
        for offset in range(start, end, COPY_BYTES):
            self._stop()
            size = min(COPY_BYTES, end - offset)
            data = os.pread(self._files[shard], size, offset)
            if len(data) < size:
                raise ConversionError(f"{self._folder / shard}: became shorter while it was being written")
            see(data)

    def sync(self) -> None:
        """Wait until every shard is on the disk."""
        for name, descriptor in self._files.items():
            with writing(self._folder / name):
                os.fsync(descriptor)


def _open_source(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConversionError:
    return ConversionError(f"{path}: cannot be read any more ({error.strerror})")


def _write_blocks(descriptor: int, data: memoryview, offset: int) -> int:
    """The bytes that went past the cache: none where a disk wants larger blocks."""
    try:
        return os.pwrite(descriptor, data, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
