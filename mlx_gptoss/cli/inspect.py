"""`mlx-gptoss inspect`: what a checkpoint is and what it needs, read from its headers; loads no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from mlx_gptoss.cli.options import dtype_option, model_argument, offline_option, revision_option
from mlx_gptoss.cli.tables import show_table

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.memory import MemoryPlan

CONTEXTS = (4096, 32_768, 131_072)


@click.command()
@model_argument
@dtype_option
@revision_option
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(model: str, dtype: str | None, revision: str | None, offline: bool, as_json: bool) -> None:
    """Show the architecture and layout of MODEL, its bytes by part, the bytes one decoded token reads, and
    the memory it needs, without loading it.
    """
    from mlx_gptoss.checkpoint.hub import resolve
    from mlx_gptoss.checkpoint.memory import plan

    folder = resolve(model, revision=revision, offline=offline)
    report = describe(model, plan(folder, dtype))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print_tables(report)


def describe(model: str, made: MemoryPlan) -> dict[str, Any]:
    """Everything `inspect` tells, as JSON-ready values; sizes in bytes."""
    from mlx_gptoss.device import available_memory, total_memory

    free = available_memory()
    contexts = sorted({min(c, made.config.max_position) for c in CONTEXTS})
    return {
        "model": model,
        "layout": made.layout,
        "dtype": str(made.dtype).removeprefix("mlx.core."),
        "architecture": asdict(made.config),
        "parts": [asdict(p) for p in made.parts],
        "bytes": {
            "stored": made.stored,
            "weights": made.weights,
            "read_per_token": made.read_per_token,
            "kv_per_token": made.kv_per_token,
            "kv_window": made.kv_window,
        },
        "contexts": [
            {"tokens": c, "kv": made.kv(c), "total": made.total(c), "fits": made.total(c) <= free}
            for c in contexts
        ],
        "machine": {"memory": total_memory(), "free": free},
    }


def _print_tables(report: dict[str, Any]) -> None:
    from mlx_gptoss.checkpoint.memory import gigabytes

    console = Console(highlight=False)
    a, sizes, machine = report["architecture"], report["bytes"], report["machine"]
    sliding = sum(kind == "sliding_attention" for kind in a["layer_types"])
    console.print(
        Text.assemble(
            (report["model"], "bold"), f": {report['layout']} layout, computed in {report['dtype']}"
        )
    )
    console.print(
        f"{a['num_layers']} layers ({sliding} with a window of {a['sliding_window']}), "
        f"hidden {a['hidden_size']}, "
        f"{a['num_experts']} experts of {a['intermediate_size']} (top {a['experts_per_token']}), "
        f"{a['num_attention_heads']} heads over {a['num_kv_heads']} KV heads of {a['head_dim']}, "
        f"vocabulary {a['vocab_size']:,}, context {a['max_position']:,}"
    )

    rows = []
    for p in report["parts"]:
        measures = map(gigabytes, (p["stored"], p["loaded"], p["read"]))
        rows.append((p["name"], p["format"], f"{p['tensors']:,}", *measures))
    tensors = sum(p["tensors"] for p in report["parts"])
    measures = map(gigabytes, (sizes["stored"], sizes["weights"], sizes["read_per_token"]))
    headings = ("part", "stored as", "tensors", "on disk", "in memory", "read/token")
    show_table(headings, rows, left=2, total=("all", "", f"{tensors:,}", *measures))

    rows = []
    for c in report["contexts"]:
        fits = Text("yes", "green") if c["fits"] else Text("no", "red")
        rows.append((f"{c['tokens']:,}", gigabytes(c["kv"]), gigabytes(c["total"]), fits))
    show_table(("context", "KV cache", "memory in all", "fits now"), rows, left=0)
    console.print(
        f"this machine: {gigabytes(machine['memory'])} of memory, {gigabytes(machine['free'])} free"
    )
