"""Every kernel against MLX's operations, on true shapes, odd ones and many drawn ones, run by the emulator;
then whole models, all kernels in place of the operations that they replace.

python -m tests.metal.parity [--drawn 500] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gptoss.checkpoint.hub import DEMO_FOLDER
from mlx_gptoss.doctor import answers
from mlx_gptoss.model.kernels import kernel as kernels
from tests.metal import cases
from tests.metal.cases import DTYPES, Case
from tests.metal.emulator import Emulator, missing
from tests.metal.whole_model import Compared, as_on_metal, compare
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES

LOGITS = 1e-4
LENGTHS = (1, 2, 100, 1000, 4095, 4096, 4097, 16384, 40000)


def kinds(drawn: int, seed: int) -> dict[str, Iterator[Case]]:
    """Cases by what they are for."""
    return {
        "true shapes, 20b": (c for t in DTYPES for c in cases.true_shapes(t, 32)),
        "true shapes, 120b": cases.true_shapes(mx.bfloat16, 128),
        "lengths to 40,000": (
            cases.attention_case(n, mx.float32, keys=n, window=0, kv_heads=1, bits=bits)
            for n in LENGTHS
            for bits in ((None, None), (8, 8))
        ),
        "edges of window and tiles": (c for t in DTYPES for c in cases.edges(t)),
        "equal experts": (c for t in DTYPES for c in cases.equals(t)),
        "NaN and infinity": (c for t in DTYPES for c in cases.not_finite(t)),
        "drawn": map(cases.drawn, range(seed, seed + drawn)),
    }


def check_loads() -> int:
    """Print what a token of 20b and 120b reads of weights, keys and values; in how many kernels not once."""
    failed = 0
    for experts in (32, 128):
        for case, once in cases.read_once(hidden=2880, experts=experts, keys=1000):
            emulator = Emulator(traced=True, seed=experts)
            kernels.run = emulator.run
            problem = case.run() or ", ".join(cases.read_otherwise(emulator.reports, once))
            loads = [n for report in emulator.reports for name, n in report.loads.items() if name in once]
            read = sum(int(n.sum(dtype=np.int64)) for n in loads)
            told = f"not once: {problem}" if problem else "each byte once"
            names = " and ".join(once)
            print(f"{case.kernel.name}, {experts} experts: {read:,} bytes of {names}, {told}", flush=True)
            failed += bool(problem)
    return failed


def whole_models(folder: Path) -> Iterator[tuple[str, Compared]]:
    """The demo model's stored replies, and two layers of 20b's width past their window."""
    demo, record = as_on_metal(DEMO_FOLDER), folder / "record.json"
    for i, answer in enumerate(answers.stored().replies):
        yield f"reply {i} of the demo model", compare(demo, answer.prompt, len(answer.reply), record)
    eight = compare(demo, answer.prompt, len(answer.reply), record, kv_bits=(8, 8))
    yield "the same with keys and values in 8 bits", eight
    cut = replace(SHAPES["20b"], layers=2, vocab=2048)
    wide = as_on_metal(write_checkpoint(folder / "cut", cut))
    yield "two layers of 20b's width", compare(wide, [5, 6, 7], 24, record, history=300)


def check_models() -> int:
    """Print a line for each model; how many differ."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for what, found in whole_models(Path(folder)):
            same = found.plain.tokens == found.emulated.tokens
            count = len(found.plain.tokens)
            told = f"off by {found.difference:.1e}" if same else "other tokens"
            print(f"{count:5} tokens, {what}: logits {told}; launches {found.launches}", flush=True)
            failed += not same or found.difference > LOGITS
    return failed


def main() -> None:
    """Print a line for each kind of case and each model; fails when any differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drawn", type=int, default=500)
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
    sys.exit(failed + check_loads() + check_models() > 0)


if __name__ == "__main__":
    main()
