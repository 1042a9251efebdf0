"""The parser of page and terminal: GitHub's extensions as cmark-gfm has them, formulas, and a few tags."""

from __future__ import annotations

from itertools import product

import pytest

from mlx_gptoss.markdown.parser import make_parser
from tests.markdown.comparing import alike

TABLES = [
    f"{lead}| {head} | b |\n|{align}|---|\n| {cell} | 2 |{after}"
    for lead, head, align, cell, after in product(
        ("", "text\n\n"), ("a", "*a*"), ("---", ":-:", "--:"), ("1", "`x`", r"a \| b"), ("", "\n\nend")
    )
]
STRUCK = [
    text.replace("x", word)
    for text in ("~~x~~", "a ~~x~~ b", "~~x", "**~~x~~**", "~~**x**~~", "`~~x~~`", "a~~x~~b", "~~ x ~~")
    for word in ("gone", "two words", "a*b*c")
]
TASKS = [
    f"{marker} {box} {text}\n{marker} plain\n"
    for marker, box, text in product(
        ("-", "*", "1."), ("[ ]", "[x]", "[X]", "[]", "[y]"), ("do it", "**do** it")
    )
]
LINKS = [
    before + address + after
    for address in ("https://example.org", "http://example.org/a?b=c", "www.example.org", "me@example.org")
    for before, after in (("", ""), ("see ", "."), ("(", ")"), ("*", "*"), ("go to ", ", then"), ("`", "`"))
]


@pytest.mark.parametrize("text", [*TABLES, *STRUCK, *TASKS, *LINKS])
def test_githubs_extensions_render_as_cmark_gfm_does(text: str) -> None:
    cmarkgfm = pytest.importorskip("cmarkgfm")
    wanted = cmarkgfm.markdown_to_html_with_extensions(
        text, extensions=["table", "strikethrough", "autolink", "tasklist"]
    )
    assert alike(make_parser().render(text)) == alike(wanted)


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("$a$", ["a"]),
        ("costs $5 and $6", []),
        (r"\$a\$", []),
        (r"\(a\) and \( b \)", ["a", " b "]),
        (r"so \[a\] in a line", ["a"]),
        ("\\[\na\n\\]", ["\na\n"]),
        ("text\n\\[\na\n\\]\nmore", ["\na\n"]),
        ("- item\n  \\[\n  a\n  \\]", ["\na\n"]),
        ("$$\na\n$$", ["\na\n"]),
        (r"\begin{align}a&=b\end{align}", [r"\begin{align}a&=b\end{align}"]),
        ("`$a$` and `\\(a\\)`", []),
        ("```\n$a$ \\(a\\)\n```", []),
        (r"\[ never closed", []),
        ("\\[ a\n\nb \\]", []),
        (r"\\(a\\)", []),
        (r"[label](x) \[not\](x)", ["not"]),
    ],
)
def test_formulas_are_found_in_every_delimiter(text: str, formulas: list[str]) -> None:
    tokens = make_parser().parse(text)
    every = [child for token in tokens for child in (token.children or [token])]
    found = [t.content for t in every if t.type.startswith("math") or t.type == "amsmath"]
    assert found == formulas


def test_html_is_text_but_for_a_few_tags() -> None:
    html = make_parser().render("List<int> <b>x</b> a<br>b<br/>c H<sub>2</sub>O <sub onclick=x>")
    assert "List&lt;int&gt; &lt;b&gt;x&lt;/b&gt; a<br>b<br/>c H<sub>2</sub>O &lt;sub onclick=x&gt;" in html
