"""`mlx-gptoss bench`: how fast a model runs on this machine, and the share of its bandwidth it reaches.

Prompts are random tokens, so no text and no tokenizer is needed, and no prefix is shared between runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mlx_gptoss.cli.options import ModelSource, NewFile, model_options
from mlx_gptoss.cli.tables import show_table
from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.memory import MemoryPlan
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.model.streamed import StreamCounts


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


# What of a row the table shows: heading and format. "again": the first token with the prompt known.
COLUMNS = {
    "runtime": ("runtime", ""),
    "context": ("context", ","),
    "batch": ("batch", ""),
    "prefill_rate": ("prefill", ",.1f"),
    "first_token": ("first", ".3f"),
    "warm_first_token": ("again", ".3f"),
    "decode_rate": ("decode", ",.1f"),
    "bandwidth_share": ("peak", ".1%"),
}
UNITS = (
    "prefill and decode in tokens/s; the first token cold, and again with the prompt known, in seconds; "
    "peak: the share of that bandwidth"
)


@click.command()
@click.option("--contexts", default="128,1024", show_default=True, help="Prompt lengths, in tokens.")
@click.option("--batches", default="1,4", show_default=True, help="Requests at once.")
@click.option("--tokens", default=32, show_default=True, help="Tokens to generate in each run.")
@click.option("--compare", type=click.Choice(["mlx-lm"]), help="Measure this runtime as well.")
@click.option(
    "--trace",
    type=NewFile(),
    help="Write to this file which experts were chosen; see docs/memory.md.",
)
@click.option(
    "--submit",
    type=NewFile(),
    metavar="FILE",
    help="Write the result to attach to the project, without personal data; see docs/results.",
)
@click.option(
    "--tune",
    is_flag=True,
    help="First measure how to use this machine's GPU, and keep it for the next start; see docs/metal.md.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@model_options
def bench(
    source: ModelSource,
    contexts: str,
    batches: str,
    tokens: int,
    compare: str | None,
    trace: Path | None,
    submit: Path | None,
    tune: bool,
    as_json: bool,
) -> None:
    """Measure MODEL's speed on this machine.

    Reports prefill and decode at each context length and number of requests, the time to the first token
    cold and with the prompt known, memory, and the share of the measured memory bandwidth that decoding one
    request reaches.
    """
    lengths, counts = _numbers(contexts, "contexts"), _numbers(batches, "batches")
    if tokens < 2:
        raise RequestError(f"tokens is {tokens}: expected 2 or more, to tell decoding from prefill", "tokens")
    if submit is not None and source.hosts is not None:
        raise click.UsageError("--submit is for one machine: it cannot be used with --hosts")
    from mlx_gptoss.checkpoint.memory import plan
    from mlx_gptoss.device import describe, peak_memory
    from mlx_gptoss.doctor.speed import measure_bandwidth

    source = source.local()
    folder = Path(source.model)
    memory = plan(folder, source.dtype)
    bandwidth = measure_bandwidth()
    with ExitStack() as stack:
        llm = stack.enter_context(source.load())
        tuned = tune_machine(llm) if tune else []
        for line in tuned:
            click.echo(line, err=True)
        if trace is not None:
            stack.enter_context(traced(llm, trace))
        rows = list(measure_engine(llm, lengths, counts, tokens))
        experts = measure_experts(llm, memory, bandwidth, tokens) if llm.stats().expert_layers else None
        kernels = kernels_used(llm)
    peak = peak_memory()
    if compare:
        rows += measure_mlx_lm(folder, lengths, tokens)

    def share(row: Row) -> float | None:
        read = memory.read_per_token + memory.kv(row.context)  # bytes, by a token of a lone request
        return read * row.decode_rate / bandwidth if row.batch == 1 else None

    report = {
        "model": Path(source.name).name,
        "layout": memory.layout,
        "dtype": str(memory.dtype).removeprefix("mlx.core."),
        "weights_bytes": memory.weights,
        "bytes_read_per_token": memory.read_per_token,
        "peak_memory_bytes": peak,
        "bandwidth_bytes_per_second": bandwidth,
        "machine": describe(),
        "experts": experts,
        "kernels": kernels,
        "tuned": tuned,
        "rows": [asdict(row) | {"bandwidth_share": share(row)} for row in rows],
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if submit is not None:
        from mlx_gptoss.cli.submission import submission

        submit.write_text(submission(report, memory, source, tokens).text(), encoding="utf-8")
        click.echo(f"wrote {submit}: docs/results tells how to attach it", err=True)


def tune_machine(llm: LLM) -> list[str]:
    """What LocalRunner.tune tells."""
    from mlx_gptoss.engine.runner import LocalRunner

    runner = llm.engine.scheduler.runner
    if not isinstance(runner, LocalRunner):
        return ["nothing to tune: the model lies on several machines"]
    return llm.engine.worker.call(runner.tune)


def kernels_used(llm: LLM) -> dict[str, float | None]:
    """The Metal kernels of ours that decode went through in the end, with the gains that are known."""
    from mlx_gptoss.engine.runner import LocalRunner

    runner = llm.engine.scheduler.runner
    kernels = runner.kernels if isinstance(runner, LocalRunner) else None
    used = {} if kernels is None else llm.engine.worker.call(lambda: kernels.used)
    return {name: verdict.gain for name, verdict in used.items()}


@contextmanager
def traced(llm: LLM, path: Path) -> Iterator[None]:
    """Write a trace of what runs meanwhile."""
    from mlx_gptoss.model.trace import TraceWriter

    runner, worker = llm.engine.scheduler.runner, llm.engine.worker
    with path.open("w", encoding="utf-8") as file:
        trace = TraceWriter(file, llm.config)

        def ended() -> list[StreamCounts]:  # at once: a step in between would be counted and not written
            runner.tell_choices(None)
            return runner.expert_counts()

        worker.call(lambda: runner.tell_choices(trace.step))
        yield
        if counts := worker.call(ended):
            trace.end(counts[0].slots, [c.misses for c in counts])


def measure_experts(llm: LLM, memory: MemoryPlan, bandwidth: float, tokens: int) -> dict[str, Any]:
    """Hits and reads of one request, its speed, and the speed that the memory and the disk would allow."""
    from mlx_gptoss.checkpoint.disk_speed import read_rates

    largest = max(llm.folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    rates = read_rates(largest, memory.expert.stored)
    before = llm.stats()
    params = SamplingParams(temperature=0.0, max_tokens=tokens, stop_token_ids=())
    stream = llm.submit([1], params)
    list(stream)
    after = llm.stats()
    misses = after.expert_misses - before.expert_misses
    chosen = misses + after.expert_hits - before.expert_hits
    read = (after.expert_read_bytes - before.expert_read_bytes) / tokens
    return {
        "slots": after.expert_layers[0].slots,
        "hit_rate": 1 - misses / chosen,
        "read_per_token": read,
        "wait_per_token": (after.expert_wait_seconds - before.expert_wait_seconds) / tokens,
        "disk_bytes_per_second": rates,
        "decode_rate": (tokens - 1) / (stream.decode_seconds or 1.0),
        "predicted_decode_rate": 1 / (memory.read_per_token / bandwidth + read / rates[4]),
    }


def _numbers(text: str, name: str) -> list[int]:
    """Whole numbers out of '128,1024'. Raises RequestError."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise RequestError(f"--{name} is {text!r}: expected whole numbers such as '128,1024'", name)
    return [int(word) for word in words]


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


def _print(report: dict[str, Any]) -> None:
    """The report as a Markdown table to paste, or as paragraphs where the terminal is too narrow for it."""
    from mlx_gptoss.checkpoint.memory import gigabytes

    click.echo(
        f"{report['model']} ({report['layout']}, {report['dtype']}): "
        f"weights {gigabytes(report['weights_bytes'])}, "
        f"{gigabytes(report['bytes_read_per_token'])} read a token, "
        f"peak memory {gigabytes(report['peak_memory_bytes'])}"
    )
    click.echo(f"memory bandwidth measured here: {gigabytes(report['bandwidth_bytes_per_second'])}/s")
    click.echo(", ".join(f"{k} {v}" for k, v in report["machine"].items()))
    if report["experts"]:
        click.echo(_of_experts(report["experts"]))
    click.echo(f"{UNITS}\n")
    headings = [heading for heading, _ in COLUMNS.values()]
    rows = [
        ["-" if row[name] is None else format(row[name], form) for name, (_, form) in COLUMNS.items()]
        for row in report["rows"]
    ]
    lines = markdown_table(headings, rows)
    if sys.stdout.isatty() and len(lines[0]) > Console().width:
        show_table(headings, rows)
    else:
        click.echo("\n".join(lines))


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table that is aligned in its source too: the first column left, numbers right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    ruler = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = []
    for first, *others in (headings, ruler, *rows):
        numbers = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *numbers])} |")
    return lines


def _of_experts(experts: dict[str, Any]) -> str:
    rates = ", ".join(f"{n / 1e9:.2f} at {d}" for d, n in experts["disk_bytes_per_second"].items())
    return (
        f"{experts['slots']} experts a layer in memory: {experts['hit_rate']:.1%} hits, "
        f"{experts['read_per_token'] / 1e6:,.0f} MB read and {experts['wait_per_token'] * 1e3:,.0f} ms "
        f"waited a token; the disk gives {rates} reads at a time (GB/s); {experts['decode_rate']:.2f} tok/s, "
        f"{experts['predicted_decode_rate']:.2f} where memory and disk are all that takes time"
    )
