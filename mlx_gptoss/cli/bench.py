"""`mlx-gptoss bench`: how fast a model runs on this machine, and the share of its bandwidth it reaches.

Prompts are random tokens, so no text and no tokenizer is needed, and no prefix is shared between runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gptoss.cli.options import ModelSource, model_options
from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams

if TYPE_CHECKING:
    from mlx_gptoss.llm import LLM

# Bytes read to measure the memory's bandwidth: more than any cache holds.
STREAMED = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """One measurement. Rates are tokens a second, times seconds; `batch` sequences ran at once."""

    runtime: str
    context: int
    batch: int
    prefill_rate: float
    first_token: float
    warm_first_token: float | None
    decode_rate: float


# What of a row the table shows: heading and format.
COLUMNS = {
    "runtime": ("runtime", ""),
    "context": ("context", ""),
    "batch": ("requests", ""),
    "prefill_rate": ("prefill tok/s", ".1f"),
    "first_token": ("first token s", ".3f"),
    "warm_first_token": ("again s", ".3f"),
    "decode_rate": ("decode tok/s", ".1f"),
    "bandwidth_share": ("of peak", ".1%"),
}


@click.command()
@model_options
@click.option("--contexts", default="128,1024", show_default=True, help="Prompt lengths, in tokens.")
@click.option("--batches", default="1,4", show_default=True, help="Requests at once.")
@click.option("--tokens", default=32, show_default=True, help="Tokens to generate in each run.")
@click.option("--compare", type=click.Choice(["mlx-lm"]), help="Measure this runtime as well.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def bench(
    source: ModelSource, contexts: str, batches: str, tokens: int, compare: str | None, as_json: bool
) -> None:
    """Measure MODEL's speed on this machine.

    Reports prefill and decode at each context length and number of requests, the time to the first token
    cold and with the prompt known, memory, and the share of the measured memory bandwidth that decoding one
    request reaches.
    """
    lengths, counts = _numbers(contexts, "contexts"), _numbers(batches, "batches")
    if tokens < 2:
        raise RequestError(f"tokens is {tokens}: expected 2 or more, to tell decoding from prefill", "tokens")
    from mlx_gptoss.checkpoint.memory import plan
    from mlx_gptoss.device import describe, peak_memory

    source = source.local()
    folder = Path(source.model)
    memory = plan(folder, source.dtype)
    bandwidth = measure_bandwidth()
    with source.load() as llm:
        rows = list(measure_engine(llm, lengths, counts, tokens))
    peak = peak_memory()
    if compare:
        rows += measure_mlx_lm(folder, lengths, tokens)

    def share(row: Row) -> float | None:
        read = memory.read_per_token + memory.kv(row.context)  # bytes, by a token of a lone request
        return read * row.decode_rate / bandwidth if row.batch == 1 else None

    report = {
        "model": folder.name,
        "layout": memory.layout,
        "dtype": str(memory.dtype).removeprefix("mlx.core."),
        "weights_bytes": memory.weights,
        "bytes_read_per_token": memory.read_per_token,
        "peak_memory_bytes": peak,
        "bandwidth_bytes_per_second": bandwidth,
        "machine": describe(),
        "rows": [asdict(row) | {"bandwidth_share": share(row)} for row in rows],
    }
    click.echo(json.dumps(report, indent=2) if as_json else table(report))


def _numbers(text: str, name: str) -> list[int]:
    """Whole numbers out of '128,1024'. Raises RequestError."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise RequestError(f"--{name} is {text!r}: expected whole numbers such as '128,1024'", name)
    return [int(word) for word in words]


def measure_bandwidth() -> float:
    """Bytes a second at which the device reads memory: the best of some passes over a large array."""
    import mlx.core as mx
    import numpy as np

    from mlx_gptoss.device import on_gpu

    data = mx.ones(STREAMED // 4, mx.float32)
    mx.eval(data)
    host = np.asarray(data)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        if on_gpu():
            mx.eval(mx.max(data))
        else:
            host.max()  # MLX's own reduction on the CPU is slower than the memory
        best = max(best, STREAMED / (time.perf_counter() - start))
    return best


def measure_engine(llm: LLM, lengths: list[int], counts: list[int], tokens: int) -> Iterator[Row]:
    """Our figures, a row for each context length and number of requests."""
    import numpy as np

    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=())

    def prompt(length: int) -> list[int]:
        return list(map(int, rng.integers(0, llm.config.vocab_size, length)))

    list(llm.submit(prompt(8), params))  # the first run compiles kernels
    for length in lengths:
        for count in counts:
            prompts = [prompt(length) for _ in range(count)]
            streams = [llm.submit(p, params) for p in prompts]
            for stream in streams:
                list(stream)
            first = max(s.time_to_first_token or 0.0 for s in streams)
            spent = max(s.decode_seconds or 0.0 for s in streams)
            rate = count * (tokens - 1) / spent
            warm = None
            if count == 1:
                again = llm.submit(prompts[0], params)
                list(again)
                warm = again.time_to_first_token
            yield Row("mlx-gptoss", length, count, count * length / first, first, warm, rate)


def measure_mlx_lm(folder: Path, lengths: list[int], tokens: int) -> list[Row]:
    """mlx-lm's figures for one request, with its own defaults."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, config = load_model(folder)
    rng = np.random.default_rng(0)
    rows = []
    for length in lengths:
        prompt = mx.array(rng.integers(0, config["vocab_size"], length))
        marks = [time.perf_counter()]
        for _ in generate_step(prompt, model, max_tokens=tokens):
            marks.append(time.perf_counter())
        first, rate = marks[1] - marks[0], (tokens - 1) / (marks[-1] - marks[1])
        rows.append(Row("mlx-lm", length, 1, length / first, first, None, rate))
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table to paste."""
    lines = [
        f"{report['model']} ({report['layout']}, {report['dtype']}): "
        f"weights {report['weights_bytes'] / 1e9:.2f} GB, "
        f"{report['bytes_read_per_token'] / 1e9:.3f} GB read a token, "
        f"peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB",
        f"memory bandwidth measured here: {report['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s",
        ", ".join(f"{k} {v}" for k, v in report["machine"].items()),
        "",
        f"| {' | '.join(heading for heading, _ in COLUMNS.values())} |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
    ]
    for row in report["rows"]:
        cells = ("" if row[name] is None else format(row[name], form) for name, (_, form) in COLUMNS.items())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
