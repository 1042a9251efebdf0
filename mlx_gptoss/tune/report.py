"""What a run leaves for people: report.md with settings, losses and samples, and loss.svg."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_gptoss.checkpoint.adapter import write_whole
from mlx_gptoss.tune.state import Progress

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = {"training": "#9aa7b5", "validation": "#1f6feb", "kept": "#d1700f"}


def write_report(folder: Path, name: str, about: Mapping[str, Any], progress: Progress) -> None:
    """Write report.md and loss.svg. about: settings and data, a line each."""
    plot = loss_plot(curves(progress))
    write_whole(folder / "loss.svg", lambda path: path.write_text(plot, encoding="utf-8"))
    text = report_text(name, about, progress)
    write_whole(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


def curves(progress: Progress) -> dict[str, list[tuple[float, float]]]:
    """By step: the loss of training (smoothed over a tenth of the steps) and of validation, and how far what
    is kept strayed.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    span = max(1, len(progress.losses) // 10)
    means = [
        sum(progress.losses[max(0, i + 1 - span) : i + 1]) / min(span, i + 1)
        for i in range(len(progress.losses))
    ]
    found["training"] = [(i + 1, mean) for i, mean in enumerate(means)]
    for label, key in (("validation", "valid"), ("kept", "keep")):
        found[label] = [(c["step"], c[key]) for c in progress.checks if c.get(key) is not None]
    return {label: points for label, points in found.items() if points}


def loss_plot(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The curves as an SVG drawing with its axes."""
    points = [p for line in lines.values() for p in line] or [(0.0, 0.0)]
    right = max(max(x for x, _ in points), 1)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = (low - 0.05, high + 0.05) if high - low < 1e-6 else (low, high)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + x / right * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        "<title>Loss by step</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(0, value)
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#e3e8ee"/>')
        parts.append(
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#57606a">{value:.2f}</text>'
        )
        x, _ = place(right * i / 4, low)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle" fill="#57606a">'
            f"{right * i / 4:.0f}</text>"
        )
    for n, (label, line) in enumerate(lines.items()):
        colour = COLOURS.get(label, "#57606a")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(line) < 40:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
                for x, y in (place(*p) for p in line)
            ]
        parts.append(f'<text x="{MARGIN + 90 * n}" y="24" fill="{colour}">{html.escape(label)}</text>')
    parts.append(
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 8}" text-anchor="end" fill="#57606a">step</text></svg>'
    )
    return "\n".join(parts) + "\n"


def report_text(name: str, about: Mapping[str, Any], progress: Progress) -> str:
    """The report in Markdown."""
    lines = [f"# {name}", ""]
    lines += [f"{progress.finished or 'not finished'}.", "", "![loss by step](loss.svg)", ""]
    lines += ["| setting | value |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in about.items()), ""]
    if progress.checks:
        keys = [k for k in ("valid", "keep", "won") if any(c.get(k) is not None for c in progress.checks)]
        titles = {
            "valid": "validation loss",
            "keep": "nats a token from what is kept",
            "won": "preferred rightly",
        }
        lines += [f"| step | {' | '.join(titles[k] for k in keys)} | |", "|---:" * (len(keys) + 1) + "|---|"]
        for check in progress.checks:
            cells = [f"{check[k]:.1%}" if k == "won" else f"{check[k]:.4f}" for k in keys]
            mark = "best" if check["step"] == progress.best_step and check["best"] else ""
            lines.append(f"| {check['step']} | {' | '.join(cells)} | {mark} |")
        lines.append("")
    sampled = [c for c in progress.checks if c.get("samples")]
    if sampled:
        first, last = sampled[0], sampled[-1]
        lines.append("## Samples")
        for i, (prompt, before) in enumerate(first["samples"]):
            lines += [
                "",
                f"> {_cell(prompt)}",
                "",
                f"Step {first['step']}:",
                "",
                "```text",
                _fenced(before),
                "```",
            ]
            if last is not first:
                lines += ["", f"Step {last['step']}:", "", "```text", _fenced(last["samples"][i][1]), "```"]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fenced(text: str) -> str:
    return text.replace("```", "` ` `")
