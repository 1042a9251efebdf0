"""The page's Markdown in the terminal: one parser for both."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from mlx_gptoss.cli.terminal.formulas import unicode_formula
from mlx_gptoss.cli.terminal.markdown import TerminalMarkdown, split_blocks


def drawn(text: str) -> str:
    console = Console(file=StringIO(), width=70, color_system=None)
    console.print(TerminalMarkdown(text))
    assert isinstance(console.file, StringIO)
    return "\n".join(line.strip() for line in console.file.getvalue().splitlines() if line.strip())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"so \(x_1^2\) and $y$", "so x₁² and y"),
        ("\\[\n\\frac{a}{b}\n\\].", "a/b."),
        (r"\begin{align}a&=b\\c&=-d\end{align}", "a = b\nc = −d"),
        (r"\(\begin{pmatrix}1&2\end{pmatrix}\)", r"\(\begin{pmatrix}1&2\end{pmatrix}\)"),
        (r"unknown \(\nosuch{x}\)", r"unknown \(\nosuch{x}\)"),
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


@pytest.mark.parametrize(
    ("latex", "shown"),
    [
        (r"\frac{-b \pm \sqrt{b^2-4ac}}{2a}", "(−b ± √(b² − 4ac))/(2a)"),
        (r"\sum_{i=1}^{n} i = \frac{n(n+1)}{2}", "∑ᵢ₌₁ⁿ i = n(n + 1)/2"),
        (r"\int_0^\infty e^{-x^2}\,dx = \frac{\sqrt{\pi}}{2}", "∫₀^∞ e^(−x²) dx = √π/2"),
        (r"\sin^2 x + 2\cos x \le \log_2 8", "sin² x + 2 cos x ≤ log₂ 8"),
        (r"\lim_{x\to 0} f'(x) \implies \alpha \cdot \beta", "lim_(x → 0) f′(x) ⟹ α · β"),
        (r"\left(\frac{1}{2}\right)^n, \quad \sqrt[3]{8}", "(½)ⁿ,  ∛8"),
        (r"\boxed{42\%} \in \mathbb{R}", "42% ∈ ℝ"),
        (r"\vec{v}, \bar{x}, 90^\circ, H_2O", "v⃗, x̅, 90°, H₂O"),
        (r"\frac{\text{distance}}{\text{time}}", "distance/time"),
        (r"x = -1, 1,000", "x = −1, 1,000"),
    ],
)
def test_easy_formulas_are_one_line_of_unicode(latex: str, shown: str) -> None:
    assert unicode_formula(latex) == shown


@pytest.mark.parametrize(
    "latex", ["{", r"\frac{a}", "x^{" * 200, "\\begin{cases}1&2\\end{cases}", "x" * 5000]
)
def test_hard_formulas_stay_as_they_are_written(latex: str) -> None:
    assert unicode_formula(latex) is None


def test_no_colour_vanishes_on_a_light_or_a_dark_terminal() -> None:
    text = "# h\n\n## h\n\n> q `c`\n\n1. a\n\n- b\n\n[l](https://x.org)\n\n| a |\n|---|\n| b |\n\n---\n\n"
    text += "```python\n@d\nclass A(int):\n    'doc'  # note\n    def f(x): return len(x) + 1\n```\n"
    console = Console(file=StringIO(), width=70, force_terminal=True, color_system="standard")
    console.print(TerminalMarkdown(text))
    assert isinstance(console.file, StringIO)
    codes = {
        code for found in re.findall(r"\x1b\[([\d;]+)m", console.file.getvalue()) for code in found.split(";")
    }
    readable = {"0", "1", "2", "3", "4", *(str(30 + colour) for colour in (1, 2, 4, 5, 6))}
    assert codes <= readable, codes - readable
