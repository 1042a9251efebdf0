"""`mlx-gptoss inspect`: what a checkpoint is and what it needs, read from its headers; loads no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from mlx_gptoss.cli.options import dtype_option, model_argument, offline_option, revision_option
from mlx_gptoss.cli.split import describe_shares, machines_of, planned_shares, show_shares
from mlx_gptoss.cli.tables import show_table

if TYPE_CHECKING:
    from mlx_gptoss.checkpoint.memory import MemoryPlan
    from mlx_gptoss.checkpoint.reader import Checkpoint

CONTEXTS = (4096, 32_768, 131_072)
MACS = (8, 16, 24, 32, 48, 64, 96, 128)  # GB of memory


@click.command()
@model_argument
@dtype_option
@revision_option
@offline_option
@click.option(
    "--hosts",
    metavar="HOSTS",
    help="Also plan the model over several Macs: mac1,mac2, a hostfile, or what memory they have, 48GB,32GB.",
)
@click.option(
    "--parallel",
    type=click.Choice(["pipeline", "tensor"]),
    default="pipeline",
    show_default=True,
    help="With --hosts: whole layers on each machine, or a part of every layer.",
)
@click.option("--split", metavar="N,N", help="With --hosts: layers (or groups of columns) of each machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    model: str,
    dtype: str | None,
    revision: str | None,
    offline: bool,
    hosts: str | None,
    parallel: str,
    split: str | None,
    as_json: bool,
) -> None:
    """Show the architecture and layout of MODEL, its bytes by part, the bytes one decoded token reads, and
    the memory it needs, without loading it.
    """
    from mlx_gptoss.checkpoint.hub import resolve
    from mlx_gptoss.checkpoint.memory import plan_checkpoint
    from mlx_gptoss.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint(resolve(model, revision=revision, offline=offline), dtype)
    report = describe(model, plan_checkpoint(checkpoint)) | by_memory(checkpoint)
    shares = [] if hosts is None else planned_shares(checkpoint, machines_of(hosts), parallel, split)
    if as_json:
        planned = {"hosts": describe_shares(shares)} if shares else {}
        click.echo(json.dumps(report | planned, indent=2))
        return
    _print_tables(report)
    if shares:
        show_shares(checkpoint, shares)


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


def by_memory(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the model runs in what is free here, and on Macs of several sizes; null where it does not."""
    from mlx_gptoss.checkpoint.expectation import expected_hits, macs_working_set, read_from_disk
    from mlx_gptoss.checkpoint.memory import plan_experts
    from mlx_gptoss.device import available_memory
    from mlx_gptoss.engine.options import EngineOptions
    from mlx_gptoss.errors import MemoryLimitError
    from mlx_gptoss.llm import SCRATCH, wanted_kv

    beside, experts = SCRATCH + wanted_kv(checkpoint, EngineOptions()), checkpoint.config.num_experts

    def row(room: int) -> dict[str, Any] | None:
        try:
            made = plan_experts(checkpoint, "auto", room, beside)
        except MemoryLimitError:
            return None
        slots = experts if made.slots is None else made.slots
        return {
            "experts_in_memory": slots,
            "expected_hit_rate": expected_hits(slots, experts),
            "read_from_disk_per_token": read_from_disk(made),
            "unpacked": made.unpacked,
            "weights": made.weights,
        }

    macs = [{"memory": size, "plan": row(macs_working_set(size * 2**30))} for size in MACS]
    return {"macs": macs, "here": row(available_memory())}


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
    _show_macs(report, a["num_experts"])
    console.print(
        f"this machine: {gigabytes(machine['memory'])} of memory, {gigabytes(machine['free'])} free: "
        f"{_in_words(report['here'], a['num_experts'])}"
    )


def _show_macs(report: dict[str, Any], experts: int) -> None:
    from mlx_gptoss.checkpoint.memory import gigabytes

    rows: list[tuple[str | Text, ...]] = []
    for mac in report["macs"]:
        made = mac["plan"]
        if made is None:
            rows.append((f"{mac['memory']} GB", Text("does not fit", "red"), "", ""))
            continue
        read = made["read_from_disk_per_token"]
        held, hits = f"{made['experts_in_memory']} of {experts}", f"{made['expected_hit_rate']:.0%}"
        rows.append((f"{mac['memory']} GB", held, hits, gigabytes(read) if read else "nothing"))
    show_table(("a Mac with", "experts in memory", "hits (a model's)", "SSD/token"), rows, left=0)


def _in_words(made: dict[str, Any] | None, experts: int) -> str:
    if made is None:
        return "the model does not fit"
    unpacked = " and ".join(made["unpacked"])
    held = made["experts_in_memory"]
    where = "every expert in memory" if held == experts else f"{held} of {experts} experts a layer in memory"
    return where + (f", {unpacked} unpacked" if unpacked else "")
