"""Tabulate the benchmarks in docs/results, and write their schema; with --check only say what is not in step.

python scripts/make_results.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from mlx_gptoss.cli.bench import markdown_table
from mlx_gptoss.cli.submission import Speed, Submission, Versions

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
SCHEMA, TABLE = "schema.json", "table.md"
HEADER = """# Benchmarks

Made of the files in this folder by `python scripts/make_results.py`; do not edit by hand. Rates are tokens a
second; the share is of the memory bandwidth that the same run measured. To add yours: [README.md](README.md).
"""
EMPTY = "There are none yet: nobody has attached one."
OF_A_RUN = ["chip", "memory", "model", "experts", "rest"]
OF_A_SPEED = ["runtime", "context", "batch", "prefill", "decode", "share", "version"]


def read(folder: Path) -> list[Submission]:
    """The files, checked. Raises ValueError that names a file and what is wrong with it."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name == SCHEMA:
            continue
        try:
            found.append(Submission.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(f"{path.name}: {where}: {first['msg']}") from None
    return found


def table(submissions: Iterable[Submission]) -> str:
    """The page: a row for each speed, by chip and model."""
    rows = []
    for one in submissions:
        machine, formats = one.machine, one.model.formats
        stored = [formats.get(part, "-") for part in ("experts", "attention")]
        run = [machine.chip, f"{machine.memory_gb:.0f} GB", one.model.size, *stored]
        rows += [run + _cells(speed, one.versions) for speed in one.speeds]
    rows.sort(key=lambda row: row[:3])
    body = "\n".join(markdown_table(OF_A_RUN + OF_A_SPEED, rows)) if rows else EMPTY
    return f"{HEADER}\n{body}\n"


def _cells(speed: Speed, versions: Versions) -> list[str]:
    return [
        speed.runtime,
        f"{speed.context:,}",
        str(speed.batch),
        f"{speed.prefill_rate:,.1f}",
        f"{speed.decode_rate:,.1f}",
        "-" if speed.bandwidth_share is None else f"{speed.bandwidth_share:.1%}",
        versions.gptoss_mlx if speed.runtime == "mlx-gptoss" else versions.mlx_lm,
    ]


def schema() -> str:
    """The JSON schema of a submission."""
    return json.dumps(Submission.model_json_schema(), indent=2) + "\n"


def main() -> int:
    """Write both, or with --check tell what is not in step: the exit status."""
    try:
        made = {TABLE: table(read(FOLDER)), SCHEMA: schema()}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if "--check" not in sys.argv[1:]:
        for name, text in made.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    stale = [name for name, text in made.items() if (FOLDER / name).read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"docs/results/{name} is not in step: run python scripts/make_results.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
