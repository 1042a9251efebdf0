"""Every kernel against MLX's operations, on true shapes, odd ones and many drawn ones, run by the emulator.

python -m tests.metal.parity [--drawn 420] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import mlx.core as mx

from mlx_gptoss.model.kernels import kernel as kernels
from tests.metal import cases
from tests.metal.cases import DTYPES, Case
from tests.metal.emulator import Emulator, missing

LENGTHS = (1, 2, 100, 1000, 4095, 4096, 4097, 16384, 40000)


def kinds(drawn: int, seed: int) -> dict[str, Iterator[Case]]:
    """Cases by what they are for."""
    return {
        "true shapes, 20b": (c for t in DTYPES for c in cases.true_shapes(t, 32)),
        "true shapes, 120b": cases.true_shapes(mx.bfloat16, 128),
        "lengths to 40,000": (
            cases.attention_case(n, mx.float32, keys=n, window=0, kv_heads=1) for n in LENGTHS
        ),
        "edges of window and tiles": (c for t in DTYPES for c in cases.edges(t)),
        "equal experts": (c for t in DTYPES for c in cases.equals(t)),
        "NaN and infinity": (c for t in DTYPES for c in cases.not_finite(t)),
        "drawn": map(cases.drawn, range(seed, seed + drawn)),
    }


def main() -> None:
    """Print a line for each kind of case; fails when any differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drawn", type=int, default=420)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    total, failed, began = 0, 0, time.monotonic()
    for kind, some in kinds(options.drawn, options.seed).items():
        count, start = 0, time.monotonic()
        for case in some:
            count += 1
            kernels.run = Emulator(seed=total + count).run
            if problem := case.run():
                failed += 1
                print(problem)
        total += count
        print(f"{count:5} {kind}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{total:5} cases, {failed} differ, {time.monotonic() - began:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
