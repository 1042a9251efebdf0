"""The page's Markdown in the terminal: one parser for both."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from mlx_gptoss.cli.terminal.markdown import TerminalMarkdown, split_blocks


def drawn(text: str) -> str:
    console = Console(file=StringIO(), width=70, color_system=None)
    console.print(TerminalMarkdown(text, "ansi_dark"))
    assert isinstance(console.file, StringIO)
    return "\n".join(line.strip() for line in console.file.getvalue().splitlines() if line.strip())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"so \(x_1^2\) and $y$", r"so \(x_1^2\) and $y$"),
        ("\\[\n\\frac{a}{b}\n\\].", "\\[\n\\frac{a}{b}\n\\]."),
        (r"\begin{align}a&=b\end{align}", r"\begin{align}a&=b\end{align}"),
        ("- [x] done\n- [ ] open\n- plain", "• ☑ done\n• ☐ open\n• plain"),
        ("a note[^n]\n\n[^n]: It says.", "a note[1]\n[1] It says."),
        ("one<br>two H<sub>2</sub>O", "one\ntwo H2O"),
        ("List<int> ~5 ~~gone~~ _it_ ***both***", "List<int> ~5 gone it both"),
        ("see https://example.org", "see https://example.org"),
    ],
)
def test_what_the_page_shows_is_readable_in_the_terminal(text: str, shown: str) -> None:
    assert drawn(text) == shown


def test_formulas_and_notes_are_blocks_of_their_own() -> None:
    text = "a\n\\[\nx\n\\]\nb\n\n[^n]: It says.\n"
    assert "".join(split_blocks(text)) == text
    assert split_blocks(text)[:3] == ["a\n", "\\[\nx\n\\]\n", "b\n\n[^n]: It says.\n"]
