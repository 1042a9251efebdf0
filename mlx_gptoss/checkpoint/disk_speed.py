"""How fast a disk gives what one expert has, at several reads at a time."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_gptoss.files import open_uncached


def read_rate(path: Path, size: int, depth: int, reads: int = 24) -> float:
    """Bytes a second of reads of `size` bytes at random places of a file, `depth` of them at a time.

    What the system kept of the file is given up first, where it can be asked to.
    """
    descriptor = open_uncached(path)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        places = max(1, os.fstat(descriptor).st_size // size)
        chosen = random.Random(depth).choices(range(places), k=reads)
        buffers = [memoryview(bytearray(size)) for _ in range(depth)]
        free = list(range(depth))

        def read(place: int) -> int:
            mine = free.pop()
            try:
                return os.preadv(descriptor, [buffers[mine]], place * size)
            finally:
                free.append(mine)

        with ThreadPoolExecutor(depth) as pool:
            start = time.perf_counter()
            total = sum(pool.map(read, chosen))
            return total / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
