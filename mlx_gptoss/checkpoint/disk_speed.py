"""How fast a disk gives what one expert has, at several reads at a time."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_gptoss.files import keep_uncached, open_uncached

DEPTHS = (1, 4, 8)
READS = 24  # a rate is taken from


def read_rates(path: Path, size: int, depths: Iterable[int] = DEPTHS, reads: int = READS) -> dict[int, float]:
    """Bytes a second of reads of `size` bytes at random places of a file, for each number of them at a time.

    What the system kept of the file is given up first, where it can be asked to. Raises OSError.
    """
    descriptor = open_uncached(path)
    try:
        return _rates(descriptor, size, depths, reads)
    finally:
        os.close(descriptor)


def scratch_rates(
    folder: Path, size: int, depths: Iterable[int] = DEPTHS, reads: int = READS
) -> dict[int, float]:
    """The same of a file of size x reads bytes that has no name, so that nothing of it can be left behind.

    Raises OSError.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        keep_uncached(file.fileno())
        block = random.randbytes(size)  # some disks compress
        for _ in range(reads):
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
        return _rates(file.fileno(), size, depths, reads)


def _rates(descriptor: int, size: int, depths: Iterable[int], reads: int) -> dict[int, float]:
    return {depth: _rate(descriptor, size, depth, reads) for depth in depths}


def _rate(descriptor: int, size: int, depth: int, reads: int) -> float:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    places = range(max(1, os.fstat(descriptor).st_size // size))
    # No place twice, if there are enough: the second time it might come from memory.
    pick = random.Random(depth)
    chosen = pick.sample(places, reads) if len(places) >= reads else pick.choices(places, k=reads)
    free = [memoryview(bytearray(size)) for _ in range(depth)]

    def read(place: int) -> int:
        mine = free.pop()
        try:
            return os.preadv(descriptor, [mine], place * size)
        finally:
            free.append(mine)

    with ThreadPoolExecutor(depth) as pool:
        start = time.perf_counter()
        total = sum(pool.map(read, chosen))
        return total / (time.perf_counter() - start)
