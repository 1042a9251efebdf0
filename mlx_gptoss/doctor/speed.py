"""How fast memory and disk are here, and what it costs to read a result of the GPU."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss import device
from mlx_gptoss.checkpoint.disk_speed import read_rates, scratch_rates
from mlx_gptoss.doctor.finding import Finding
from mlx_gptoss.doctor.machine import cache_folder

# Bytes read to measure the memory's bandwidth: more than any cache holds.
STREAMED = 512 * 2**20
COLUMNS = 4096  # float32 values of a row of them
PASSES = 4  # over all of them that are launched at once
# Bytes of an expert of gpt-oss: what a token reads of the disk where the expert is not in memory.
EXPERT = 13_219_200
READS = 16  # of one expert each
# Bytes that must be left on a disk that is written to.
SPARE = 4 * 2**30
CROSSINGS = 200
BANDWIDTH = "bytes_per_second"  # the figure's name
A_WHILE = 0.5  # seconds


def findings(weights: Path | None = None) -> Iterator[Finding]:
    """The figures. weights: a file to read from; one is made where the Hub's cache is if it is too small."""
    rate = measure_bandwidth()
    what = "the GPU reads" if device.on_gpu() else "all cores together read"
    told = f"{what} {rate / 1e9:,.1f} GB/s"
    yield Finding("speed", "memory read", "info", told, {BANDWIDTH: rate})
    yield _disk(weights)
    yield _crossing()


def _disk(weights: Path | None) -> Finding:
    size = READS * EXPERT
    try:
        if weights is not None and weights.stat().st_size >= size:
            where, rates = "MODEL", read_rates(weights, EXPERT, reads=READS)
        else:
            where, folder = "Hub's cache", cache_folder()
            if shutil.disk_usage(folder).free < size + SPARE:
                told = f"not measured: a file of {size / 1e6:.0f} MB would leave too little room"
                return Finding("speed", "disk read", "warning", told)
            rates = scratch_rates(folder, EXPERT, reads=READS)
    except OSError as error:
        return Finding("speed", "disk read", "warning", f"not measured: {error.strerror or error}")
    told = ", ".join(f"{rate / 1e9:.1f}" for rate in rates.values())
    told = f"{told} GB/s by {', '.join(map(str, rates))} reads at a time, {where}"
    figures = {f"bytes_per_second_at_{depth}": rate for depth, rate in rates.items()}
    return Finding("speed", "disk read", "info", told, figures)


def _crossing() -> Finding:
    if not device.on_gpu():
        return Finding("speed", "GPU to CPU", "none", "there is no GPU to wait for")
    seconds = measure_crossing()
    told = f"{seconds * 1e6:,.0f} µs to launch one small operation and read its result"
    return Finding("speed", "GPU to CPU", "info", told, {"seconds": seconds})


def measure_crossing() -> float:
    """Seconds, the median, from a small operation's launch on the default device to its result in Python."""
    one, spans = mx.array(1.0), []
    for _ in range(CROSSINGS):
        start = time.perf_counter()
        mx.add(one, one).item()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans)


def measure_bandwidth() -> float:
    """Bytes a second at which the default device reads memory: the best of some passes over a large array."""
    data = mx.ones((STREAMED // 4 // COLUMNS, COLUMNS), mx.float32)
    mx.eval(data)
    if device.on_gpu():
        # Launched together, so that the launch counts little; along rows or over all, whichever is faster.
        seconds = min(_shortest(partial(_read_by_gpu, data, axis)) for axis in (-1, None)) / PASSES
    else:
        # MLX's own reductions on the CPU are slower than the memory.
        parts = np.array_split(np.asarray(data), os.cpu_count() or 1)
        with ThreadPoolExecutor(len(parts)) as pool:
            seconds = _shortest(lambda: list(pool.map(np.max, parts)))
    rate = data.nbytes / seconds
    del data
    device.release_memory()
    return rate


def _read_by_gpu(data: mx.array, axis: int | None) -> None:
    mx.eval([mx.max(data, axis=axis) for _ in range(PASSES)])


def _shortest(work: Callable[[], object]) -> float:
    """Seconds: the best of all runs in a while. The first compiles kernels and touches the memory."""
    spans: list[float] = []
    while len(spans) < 3 or sum(spans) < A_WHILE:
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)
    return min(spans)
