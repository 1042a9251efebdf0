"""How far conversions of one checkpoint are from it: this converter's recipes against `mlx_lm.convert -q`.

    python -m benchmarks.quality [--layers 4] [--experts 8] [--vocab 8192] [--tokens 256] [--folder DIR]

A random checkpoint of gpt-oss-20b's widths, cut in layers, experts and vocabulary, is converted several ways;
each reads the same random tokens beside the source (see `mlx_gptoss.convert.quality`). Random weights predict
nothing, so perplexities mean nothing here; KL divergence and agreement compare the conversions with each
other, not with what a trained model would show.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.quality import compare
from mlx_gptoss.convert.recipes import make_recipe
from mlx_gptoss.convert.verify import verify
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES


def conversions(source: Path, root: Path) -> Iterator[tuple[str, Path, float]]:
    """Name, folder and seconds of each way to convert `source`."""
    for name, recipe, fast in (
        ("mxfp4", "mxfp4", False),
        ("mxfp4-q8", "mxfp4-q8", False),
        ("mxfp4-q4", "mxfp4-q4", False),
        ("mxfp4-q4 --fast", "mxfp4-q4", True),
    ):
        start = time.perf_counter()
        made = convert(source, root / name.replace(" ", ""), make_recipe(recipe), fast=fast)
        yield name, made.folder, time.perf_counter() - start
    from mlx_lm import convert as mlx_lm_convert

    start = time.perf_counter()
    mlx_lm_convert(str(source), str(root / "mlx-lm"), quantize=True)
    yield "mlx_lm.convert -q", root / "mlx-lm", time.perf_counter() - start


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    shape = replace(SHAPES["20b"], layers=args.layers, experts=args.experts, vocab=args.vocab)
    tokens = np.random.default_rng(0).integers(0, args.vocab, args.tokens).tolist()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        source = write_checkpoint(root / "source", shape)
        write_byte_tokenizer(source)
        print(
            f"{args.layers} layers, {args.experts} experts, vocabulary {args.vocab:,}: {size(source):,} bytes"
        )
        print(
            f"{'conversion':20} {'bytes':>13} {'KL, nats':>9} {'p99':>8} {'top-1':>7} {'s':>6} "
            f"{'verify GB/s':>12}"
        )
        for name, folder, seconds in conversions(source, root):
            found = compare(folder, source, tokens)
            rate = ""
            if (folder / "manifest.json").exists():
                start = time.perf_counter()
                checked = verify(folder)
                checked.check()
                rate = f"{checked.bytes / (time.perf_counter() - start) / 1e9:.2f}"
            print(
                f"{name:20} {size(folder):13,} {found.kl:9.5f} {found.kl_p99:8.5f} {found.top1:7.1%} "
                f"{seconds:6.1f} {rate:>12}"
            )


if __name__ == "__main__":
    main()
