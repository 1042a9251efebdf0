"""Tables at the widths of real terminals: nothing is cut, empty or ragged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.text import Text

from mlx_gptoss.checkpoint.memory import gigabytes
from mlx_gptoss.cli import run
from mlx_gptoss.cli.bench import markdown_table
from mlx_gptoss.cli.tables import show_table
from mlx_gptoss.convert.convert import convert

WIDTHS = (60, 80, 100, 200)
HEADINGS = ("model", "made by", "nothing", "bytes")
ROWS = (("a", "copying", "", "1,234"), ("b-longer", "affine-search, copying", "", "5"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("demo", tmp_path_factory.mktemp("converted") / "demo-mxfp4-q4").folder


def shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, *args: object
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run([str(a) for a in args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "words",
    [
        "inspect demo",
        "inspect demo --hosts 8GB,16GB",
        "verify {0}",
        "verify {0} --source demo",
        "share {0} a/b --license mit --base-model a/c --dry-run",
        "models {0}",
    ],
)
def test_tables_are_whole_at_every_width(
    converted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    words: str,
) -> None:
    page = shown(capsys, monkeypatch, width, *words.format(converted).split())
    assert "…" not in page and not re.search(r"\b0\.0+ (GB|MB|kB)", page)
    plan = page.partition("\n---\n")[0]  # of share, and not the card
    lines = [line.rstrip() for line in plan.splitlines()]
    table = lines[lines.index("") : len(lines) - lines[::-1].index("")]  # not the sentences around it
    assert len(table) > 5 and all(len(line) <= width for line in table)


def test_a_column_without_content_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_table(HEADINGS, ROWS, left=2)
    page = capsys.readouterr().out
    assert "nothing" not in page
    lines = [line.rstrip() for line in page.splitlines() if line.strip()]
    assert [line.split() for line in lines if "copying" in line] == [
        ["a", "copying", "1,234"],
        ["b-longer", "affine-search,", "copying", "5"],
    ]
    assert len({len(line) for line in lines}) <= 2  # numbers end below each other


def test_a_narrow_terminal_gets_a_paragraph_for_each_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    show_table(HEADINGS, [*ROWS, ("c", Text("x" * 50, "green"), "", "7")], left=2, total=("all", "", "", "9"))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:3] == ["a", "made by  copying", "bytes    1,234"]
    assert lines[-2:] == ["all", "bytes  9"]
    assert sum(line.count("x") for line in lines) == 50


def test_a_markdown_table_is_aligned_in_its_source() -> None:
    lines = markdown_table(["runtime", "decode"], [["mlx-gptoss", "1,234.5"], ["mlx-lm", "-"]])
    assert lines == [
        "| runtime    |  decode |",
        "| ---------- | ------: |",
        "| mlx-gptoss | 1,234.5 |",
        "| mlx-lm     |       - |",
    ]


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 bytes"), (99, "99 bytes"), (4608, "4.6 kB"), (3_660_000, "3.7 MB"), (13_761_264_768, "13.76 GB")],
)
def test_sizes_are_never_zero_of_a_unit(count: int, told: str) -> None:
    assert gigabytes(count) == told
