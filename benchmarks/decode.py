"""Load time, prefill, decode and memory on one checkpoint, against mlx-lm on the same checkpoint in one run.

    python -m tests.support.checkpoints --shape 20b --layers 4 --out /tmp/cut
    python -m benchmarks.decode /tmp/cut [--decode 16] [--prefill 64 256] [--json FILE]

Every competitor runs in a process of its own; nothing else should run on the machine. The prompts are random
token ids, decoding is greedy. On a CPU mlx-lm runs twice: cast to float32, and as it comes (bfloat16), decode
alone. --blas preloads a BLAS library for it, since MLX's Linux wheel links a slow one. Reading is timed from
the state of the page cache that loading finds.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT = (
    4  # tokens before the measured decode: short, since mlx-lm takes seconds a token in bfloat16 on a CPU
)
READ_BYTES = 16 << 20


# ----------------------------------------------------------------- competitors, each in its own process


def run_ours(folder: Path, dtype: str | None, prefill: list[int], decode: int) -> dict[str, Any]:
    """This package, through its engine."""
    from mlx_gptoss import SamplingParams, load
    from mlx_gptoss.checkpoint.memory import plan
    from mlx_gptoss.device import peak_memory

    started = time.perf_counter()
    with load(folder, dtype=dtype) as llm:
        result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
        for tokens in prompts(llm.config.vocab_size, prefill):
            stream = llm.submit(tokens, SamplingParams(temperature=0.0, max_tokens=1, stop_token_ids=()))
            list(stream)
            rate(result, "prefill", len(tokens), stream.time_to_first_token)
        (prompt,) = prompts(llm.config.vocab_size, [PROMPT])
        stream = llm.submit(prompt, SamplingParams(temperature=0.0, max_tokens=decode + 1, stop_token_ids=()))
        list(stream)
        rate(result, "decode", decode, stream.decode_seconds)
    made = plan(folder, dtype)
    result["peak_bytes"] = peak_memory()
    result["planned_bytes"] = made.total(max([*prefill, PROMPT + decode]))
    result["read_per_token_bytes"] = made.read_per_token
    return result


def run_mlx_lm(folder: Path, dtype: str | None, prefill: list[int], decode: int) -> dict[str, Any]:
    """mlx-lm, through its own generate_step."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    from mlx_gptoss.device import peak_rss

    started = time.perf_counter()
    model, _ = load_model(folder, lazy=True)
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    for tokens in prompts(model.args.vocab_size, prefill):
        started = time.perf_counter()
        list(generate_step(mx.array(tokens), model, max_tokens=1))
        rate(result, "prefill", len(tokens), time.perf_counter() - started)
    (prompt,) = prompts(model.args.vocab_size, [PROMPT])
    steps = generate_step(mx.array(prompt), model, max_tokens=decode + 1)
    next(steps)
    started = time.perf_counter()
    list(steps)
    rate(result, "decode", decode, time.perf_counter() - started)
    result["peak_bytes"] = peak_rss()
    return result


def run_read(folder: Path) -> dict[str, Any]:
    """Read the checkpoint's files, as plainly as can be."""
    buffer, total = bytearray(READ_BYTES), 0
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return {"load_seconds": time.perf_counter() - started, "bytes": total}


def prompts(vocab: int, lengths: list[int]) -> Iterator[list[int]]:
    """Random prompts of the given lengths, the same for every competitor, sharing no prefix."""
    import numpy as np

    for length in lengths:
        yield np.random.default_rng(length).integers(0, vocab, length).tolist()


def rate(result: dict[str, Any], what: str, tokens: int, seconds: float | None) -> None:
    name = what if what == "decode" else f"{what}_{tokens}"
    result[f"{name}_tokens_per_second"] = tokens / seconds if seconds else None


# ------------------------------------------------------------------------------------------- the parent


def child(
    name: str, folder: Path, dtype: str | None, prefill: list[int], decode: int, blas: str | None
) -> Any:
    """One competitor in a fresh process."""
    job = json.dumps([name, str(folder), dtype, prefill, decode, blas])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", "--job", job],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_job(text: str) -> dict[str, Any]:
    name, folder, dtype, prefill, decode, blas = json.loads(text)
    if name == "read":
        return run_read(Path(folder))
    if blas:
        # Before MLX is loaded, so that its calls bind to this library.
        ctypes.CDLL(blas, mode=ctypes.RTLD_GLOBAL)
    return {"ours": run_ours, "mlx-lm": run_mlx_lm}[name](Path(folder), dtype, prefill, decode)


def forget_pages(folder: Path) -> bool:
    """Ask the kernel to drop the files' pages from its cache; False where it can't be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def compare(
    folder: Path, prefill: list[int], decode: int, blas: str | None, skip_bfloat16: bool
) -> dict[str, Any]:
    """Run everything and put the ratios beside the figures."""
    from mlx_gptoss.device import describe, on_gpu

    cold = forget_pages(folder)
    results: dict[str, Any] = {"plain reading": child("read", folder, None, [], 0, None)}
    if cold:
        forget_pages(folder)
    results["ours"] = ours = child("ours", folder, None, prefill, decode, None)
    same = "bfloat16" if on_gpu() else "float32"
    results[f"mlx-lm {same}"] = like = child("mlx-lm", folder, same, prefill, decode, blas)
    ratios = {
        "load / plain reading": ours["load_seconds"] / results["plain reading"]["load_seconds"],
        "peak / planned": ours["peak_bytes"] / ours["planned_bytes"],
        f"decode, times mlx-lm {same}": ratio(ours, like, "decode"),
    }
    for length in prefill:
        ratios[f"prefill of {length}, times mlx-lm {same}"] = ratio(ours, like, f"prefill_{length}")
    if same == "float32" and not skip_bfloat16:
        results["mlx-lm bfloat16"] = default = child("mlx-lm", folder, None, [], decode, blas)
        ratios["decode, times mlx-lm bfloat16 (its default)"] = ratio(ours, default, "decode")
    about = describe() | {"mlx_lm": version("mlx-lm"), "blas preloaded for mlx-lm": blas or "none"}
    about["page cache"] = "dropped before reading and before loading" if cold else "as found"
    return {"checkpoint": str(folder), "about": about, "results": results, "ratios": ratios}


def ratio(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> float:
    return float(ours[f"{what}_tokens_per_second"] / theirs[f"{what}_tokens_per_second"])


def version(package: str) -> str:
    from importlib.metadata import version as installed

    return installed(package)


def print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    console.print(f"{report['checkpoint']}: {', '.join(f'{k} {v}' for k, v in report['about'].items())}")
    table = Table("measured", *report["results"])
    for row in dict.fromkeys(k for r in report["results"].values() for k in r):
        cells = [r.get(row) for r in report["results"].values()]
        unit = "bytes" if "bytes" in row else row.rpartition("_")[2]
        scale, unit = (1e9, "GB") if unit == "bytes" else (1, {"second": "tokens/s", "seconds": "s"}[unit])
        name = row.replace("_tokens_per_second", "").replace("_seconds", "").replace("_bytes", "")
        shown = ("" if c is None else f"{c / scale:,.2f}" for c in cells)
        table.add_row(f"{name.replace('_', ' ')}, {unit}", *shown)
    console.print(table)
    for name, value in report["ratios"].items():
        console.print(f"{name}: [bold]{value:.2f}[/bold]")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--decode", type=int, default=16, help="tokens to decode")
    parser.add_argument("--prefill", type=int, nargs="*", default=[64, 256], help="prompt lengths")
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="library for mlx-lm")
    parser.add_argument("--skip-bfloat16", action="store_true", help="leave out mlx-lm's slow CPU default")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(run_job(args.job)))
        return
    if args.folder is None:
        parser.error("name a checkpoint's folder")
    report = compare(args.folder, args.prefill, args.decode, args.blas, args.skip_bfloat16)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print_table(report)


if __name__ == "__main__":
    main()
