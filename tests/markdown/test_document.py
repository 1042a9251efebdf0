"""Markdown as HTML: safe whatever it says, the same in one piece as while it grows."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlx_gptoss.markdown.document import MAX_LENGTH, blocks
from mlx_gptoss.markdown.formula import mathml
from mlx_gptoss.markdown.worker import Renderer, Text
from tests.markdown.hostile import documents

FORMULAS = (Path(__file__).parent / "formulas.txt").read_text("utf-8").splitlines()
RICH = r"""# Title

Some **bold**, _italic_, ***both***, `code`, [a link](https://example.org/x) and $x^2$.

- one
- two
  - nested

  with a paragraph
1. first
2. second

- [ ] open
- [x] done

| a | b |
|---|--:|
| 1<br>2 | \(y\) |

> A quote
> of two lines

```python
def f(x):

    return "<b>"
```

\[
\frac{a}{b}
\]

Setext
===

The end.[^1]

[^1]: A note.
"""


class _Elements(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def html_of(text: str) -> str:
    return "".join(block.html for block in blocks(text))


@pytest.mark.parametrize("latex", FORMULAS)
def test_formulas_become_mathml(latex: str) -> None:
    assert len(FORMULAS) >= 100
    html = html_of(f"\\[\n{latex}\n\\]")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in html
    assert "\\" not in html


@pytest.mark.parametrize(
    "latex", [r"\unknown{x}", r"\ce{H2O}", r"\frac{1", r"\left( x", r"a}{b", "a" + "{" * 500]
)
def test_a_formula_that_cannot_be_converted_is_shown_as_written(latex: str) -> None:
    assert mathml(latex, display=False) is None
    assert f'<span class="math">\\({latex}\\)</span>' in html_of(f"so \\({latex}\\) it is")


def test_functions_stand_apart_from_what_is_around_them() -> None:
    def spaces(latex: str) -> list[tuple[str, str]]:
        html = html_of(f"\\({latex}\\)")
        return re.findall(r'<mo lspace="([\d.]+)em" rspace="([\d.]+)em">', html)

    thin = "0.1667"
    assert spaces(r"O(n \log n)") == [(thin, thin)]
    assert spaces(r"\sin(x) + 2\cos x") == [("0", "0"), (thin, thin)]
    assert spaces(r"n \log_2 n = \ln") == [(thin, thin), ("0", "0")]
    assert spaces(r"x + y") == []


def test_nothing_in_a_hostile_text_runs_loads_or_covers() -> None:
    texts = documents()
    assert len(texts) >= 300
    renderer = Renderer()
    for start in range(0, len(texts), 25):
        for text, found in zip(
            texts[start : start + 25],
            renderer.render([Text(t) for t in texts[start : start + 25]]),
            strict=True,
        ):
            for tag, attributes in _Elements("".join(block.html for block in found)).found:
                assert tag not in (
                    "script",
                    "img",
                    "iframe",
                    "style",
                    "link",
                    "meta",
                    "base",
                    "form",
                    "svg",
                ), text
                assert tag not in (
                    "object",
                    "embed",
                    "video",
                    "audio",
                    "input",
                    "annotation-xml",
                    "mglyph",
                ), text
                for name, value in attributes.items():
                    assert not name.startswith("on") and name not in ("style", "src", "srcset", "action"), (
                        text
                    )
                    if name == "href":
                        assert tag == "a" and re.match(r"(https?://|mailto:|#fn)", value or "", re.I), text
                    if name in ("width", "height", "minsize", "depth", "lspace"):
                        assert not re.search(r"\d{3}", (value or "").partition(".")[0]), text
    renderer.close()


def test_links_say_where_they_come_from_and_images_are_links() -> None:
    html = html_of("[x](https://e.example) ![pic](https://e.example/p.png) [r](/v1) [j](javascript:x)")
    assert html.count('target="_blank" rel="noopener noreferrer nofollow"') == 2
    assert ">pic</a>" in html and "r (/v1)" in html and "[j](javascript:x)" in html


def test_code_has_classes_and_no_styles() -> None:
    html = html_of('```python\ndef f(): return "<b>"\n```')
    assert '<pre data-language="python" tabindex="0"><code><span class="k">def</span>' in html
    assert "&lt;b&gt;" in html and "style" not in html
    assert (
        html_of("```nosuch\n<x>\n```")
        == '<pre data-language="nosuch" tabindex="0"><code>&lt;x&gt;\n</code></pre>\n'
    )


def test_tables_tasks_and_footnotes_are_ready_for_the_page() -> None:
    html = html_of(RICH)
    assert '<div class="table" tabindex="0" role="group" aria-label="Table"><table>' in html
    assert '<td data-align="right">' in html and "1<br>2" in html
    assert '<li class="todo"><span class="task" role="img" aria-label="done">☑</span> done</li>' in html
    assert '<a href="#fn-0-1"' in html and 'id="fn-0-1"' in html
    assert "<em><strong>both</strong></em>" in html and '<h3 data-level="1">Title</h3>' in html


@pytest.mark.parametrize("size", [1, 3, 17])
def test_a_growing_text_ends_as_the_whole(size: int) -> None:
    """The page's way: settled blocks are kept, the rest is sent again."""
    text = RICH.partition("The end")[0]  # a footnote needs the whole text, which the page renders at the end
    settled: list[str] = []
    rest = ""
    for start in range(0, len(text), size):
        rest += text[start : start + size]
        done = [block for block in blocks(rest, growing=True) if block.lines is not None]
        settled += [block.html for block in done]
        if done:
            rest = "\n".join(rest.split("\n")[done[-1].lines :])
    settled += [block.html for block in blocks(rest)]
    assert settled == [block.html for block in blocks(text)]


def test_lines_count_to_each_blocks_end() -> None:
    text = RICH.partition("The end")[0]
    lines = text.split("\n")
    start = 0
    for block in blocks(text):
        assert block.lines is not None and block.lines > start
        piece = "\n".join(lines[start : block.lines])
        assert [one.html for one in blocks(piece)] == [block.html]
        start = block.lines


def test_what_is_too_long_or_too_deep_is_shown_as_written() -> None:
    for text in ("a" * (MAX_LENGTH + 1), "> " * 20_000 + "x", ">" * 20_000, "- " * 300 + "x"):
        (block,) = blocks(text)
        assert block.html.startswith('<div class="plain">')
        assert len(block.html) >= len(text)


def test_a_text_that_takes_too_long_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    class Timer:
        """Time is up at once for all three and for the second alone, and never for the others."""

        def __init__(self, seconds: float, end: Callable[[], None]) -> None:
            given.append(seconds)
            self._end = end if len(given) in (1, 3) else None

        def start(self) -> None:
            if self._end is not None:
                self._end()

        def cancel(self) -> None:
            pass

    monkeypatch.setattr("mlx_gptoss.markdown.worker.threading.Timer", Timer)
    renderer = Renderer(seconds=0.5)
    slow = Text("![" * 90_000)
    before, stuck, after = renderer.render([Text("**a**"), slow, Text("*b*")])
    assert given == [0.5] * 4
    assert before[0].html == "<p><strong>a</strong></p>\n" and after[0].html == "<p><em>b</em></p>\n"
    assert stuck[0].html == f'<div class="plain">{slow.text}</div>'
    renderer.close()
    assert renderer.render([Text("c")])[0][0].html == "<p>c</p>\n"
    renderer.close()


def test_any_text_renders_and_loses_no_word() -> None:
    rng = random.Random(0)
    pieces = [
        "word",
        "*",
        "_",
        "`",
        "\n",
        "\n\n",
        "- ",
        "> ",
        "|",
        "$",
        "\\(",
        "\\)",
        "[",
        "]",
        "(",
        ")",
        "  ",
    ]
    for _ in range(300):
        text = "".join(rng.choice(pieces) + " " * rng.randrange(2) for _ in range(40))
        shown = re.sub(r"<[^>]*>", "", html_of(text))
        assert shown.count("word") == text.count("word"), text


def test_headings_are_an_outline_whatever_they_begin_with() -> None:
    html = html_of("### a\n\n# b\n\n#### c\n\n## d\n\n##### e")
    found = re.findall(r'<(h\d) data-level="(\d)">(\w)</\1>', html)
    assert found == [("h3", "3", "a"), ("h3", "1", "b"), ("h4", "4", "c"), ("h4", "2", "d"), ("h5", "5", "e")]
