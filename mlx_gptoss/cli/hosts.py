"""`mlx-gptoss hosts`: several machines for one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlx_gptoss.distributed.check import Report


@click.group(no_args_is_help=True)
def hosts() -> None:
    """Check several machines for one model over all of them."""


@hosts.command()
@click.argument("hosts", metavar="HOSTS")
@click.option(
    "--write",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a hostfile with the fastest addresses, as `mlx.launch` reads it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(hosts: str, target: Path | None, as_json: bool) -> int:
    """Reach HOSTS (mac1,mac2 or a hostfile; this machine first) by ssh, compare their versions, and measure
    latency and bandwidth of every link by each way there is. Exit status 1 tells of a problem.
    """
    from mlx_gptoss.distributed.check import check_hosts
    from mlx_gptoss.distributed.hosts import read_hosts

    report = check_hosts(read_hosts(hosts))
    problems = report.problems
    if as_json:
        facts = [asdict(f) if not isinstance(f, str) else {"problem": f} for f in report.facts]
        links = [asdict(link) for link in report.links]
        told = {"hostfile": json.loads(report.hosts.to_json()), "hosts": facts, "links": links}
        click.echo(json.dumps(told | {"problems": problems}, indent=2))
    else:
        _show(report)
        for problem in problems:
            click.echo(f"problem: {problem}", err=True)
        for link in report.links:
            if link.problem and link.problem not in problems:
                click.echo(f"{link.way}, {link.address}: {link.problem}", err=True)
    if target is not None and not problems:
        target.write_text(report.hosts.to_json(), encoding="utf-8")
        click.echo(f"{target}: {len(report.facts)} hosts", err=True)
    return 1 if problems else 0


def _show(report: Report) -> None:
    from mlx_gptoss.checkpoint.memory import gigabytes
    from mlx_gptoss.cli.tables import show_table

    rows = []
    for rank, (host, fact) in enumerate(zip(report.hosts.hosts, report.facts, strict=True)):
        if isinstance(fact, str):
            rows.append((str(rank), host.name, "no answer", "", "", ""))
            continue
        versions = f"{fact.package}, {fact.mlx}, {fact.python}"
        sizes = (gigabytes(fact.memory), gigabytes(fact.room))
        rows.append((str(rank), host.name, fact.chip, versions, *sizes))
    show_table(("rank", "host", "chip", "gptoss-mlx, mlx, Python", "memory", "room"), rows, left=4)
    measured = []
    for link in report.links:
        ranks, name = "-".join(map(str, link.ranks)), {"tcp": "TCP"}.get(link.way, f"all_sum, {link.way}")
        if link.latency is None or link.bandwidth is None:
            measured.append((ranks, name, link.address, "failed", ""))
            continue
        speed = (f"{link.latency * 1e6:,.0f} us", f"{gigabytes(link.bandwidth)}/s")
        measured.append((ranks, name, link.address, *speed))
    if measured:
        show_table(("ranks", "by", "address", "there and back", "bandwidth"), measured, left=3)
