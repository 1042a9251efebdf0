"""The browser tool: search, open, find and citations over a folder or the user's own functions."""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path

import pytest

from mlx_gptoss.errors import ToolError
from mlx_gptoss.harmony import BROWSER, ToolCall
from mlx_gptoss.tools.browser import BrowserTool
from mlx_gptoss.tools.markup import html_page, markdown_page
from mlx_gptoss.tools.pages import FetchedPages, FolderPages, Hit, Page

HTML = """<!doctype html><html><head><title>Bees &amp; honey</title><style>p {color: red}</style></head>
<body><h1>Bees</h1><p>A bee   makes
honey. See <a href="wasps.html">the <b>wasps</b></a> or <a href="https://example.org/x">a site</a>.</p>
<ul><li>one</li><li>two</li></ul><script>alert(1)</script>
<table><tr><th>kind</th><th>legs</th></tr><tr><td>bee</td><td>6</td></tr></table>
<pre>a
  b</pre><p>【fake】 <a href="#top">top</a> <img src="x" alt="a hive"></p></body></html>"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pages"
    (root / "deep").mkdir(parents=True)
    (root / "honey.md").write_text(
        "# Honey\n\nHoney is made by bees from nectar.\n"
        + "\n".join(f"Fact {i} about sugar." for i in range(300))
    )
    (root / "deep" / "bees.html").write_text(HTML)
    (root / "deep" / "wasps.html").write_text("<title>Wasps</title><p>Wasps make none, but like honey.</p>")
    (root / "notes.txt").write_text("Remember the [honey](honey.md) and [bees](deep/bees.html#legs).")
    (root / "image.png").write_bytes(b"honey")
    (root / ".hidden.md").write_text("honey secret")
    (tmp_path / "secret.md").write_text("honey outside")
    (root / "link.md").symlink_to(tmp_path / "secret.md")
    (root / "linked").symlink_to(tmp_path)
    return root


def call(tool: BrowserTool, name: str, **arguments: object) -> str:
    return tool.handle(ToolCall(0, "c", f"browser.{name}", json.dumps(arguments), f"browser.{name}"))


def test_it_is_declared_as_the_model_was_taught(folder: Path) -> None:
    assert BrowserTool(FolderPages(folder)).namespace == BROWSER


def test_search_lists_pages_with_link_ids_best_first(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    lines = call(tool, "search", query="nectar sugar").split("\n")
    assert lines[0] == "[0] nectar sugar"
    assert lines[1] == "**viewing lines [0 - 2] of 2**"
    assert lines[3] == "L0: # Search Results"
    assert lines[5].startswith("L2:   * 【0†Honey†honey.md】 Honey is made by bees from nectar.")
    again = call(tool, "search", query="bee")
    assert "【0†Bees & honey†deep/bees.html】 A bee makes honey. See the wasps or a" in again


def test_search_finds_nothing_outside_and_nothing_hidden(folder: Path) -> None:
    text = call(BrowserTool(FolderPages(folder)), "search", query="honey", topn=50)
    assert "secret" not in text
    assert "link" not in text
    assert "png" not in text
    for name in ("honey.md", "deep/bees.html", "deep/wasps.html", "notes.txt"):
        assert name in text


def test_open_follows_a_link_and_numbers_the_lines(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    call(tool, "search", query="nectar")
    text = call(tool, "open", id=0)
    lines = text.split("\n")
    assert lines[0] == "[1] Honey (honey.md)"
    assert lines[1].startswith("**viewing lines [0 - ")
    assert lines[3:6] == ["L0: # Honey", "L1: ", "L2: Honey is made by bees from nectar."]
    assert len(text) < 5000


def test_open_scrolls_and_limits_the_lines(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    call(tool, "open", id="honey.md")
    lines = call(tool, "open", loc=100, num_lines=3).split("\n")
    assert lines[1] == "**viewing lines [100 - 102] of 302**"
    assert lines[3:] == [f"L{i}: Fact {i - 3} about sugar." for i in (100, 101, 102)]
    assert call(tool, "open", loc=303).startswith("Error: there is no line 303")


def test_links_between_pages_lead_on(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    assert "Remember the 【0†honey】 and 【1†bees】." in call(tool, "open", id="notes.txt")
    assert call(tool, "open", id=1).startswith("[1] Bees & honey (deep/bees.html)")
    assert call(tool, "open", id=0).startswith("[2] Wasps (deep/wasps.html)")
    assert call(tool, "open", id=1, cursor=0).startswith("[3] Bees & honey")
    assert call(tool, "open", id=7) == "Error: display 3 has no link 7"


def test_find_shows_places_that_can_be_opened_and_cited(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    call(tool, "open", id="honey.md")
    text = call(tool, "find", pattern="FACT 250")
    assert "Find results for text: `FACT 250` in `Honey`" in text
    assert "L0: # 【0†match at L253】" in text
    assert "L1: Fact 250 about sugar." in text
    assert "**viewing lines [249 - " in call(tool, "open", id=0)
    assert "No `find` results" in call(tool, "find", pattern="zebra", cursor=0)
    assert call(tool, "find", pattern="x", cursor=1).startswith("Error: find works on a page")


@pytest.mark.parametrize(
    "url",
    [
        "../secret.md",
        "deep/../../secret.md",
        "link.md",
        "linked/secret.md",
        ".hidden.md",
        "%2e%2e/secret.md",
        "file:///etc/passwd",
        "/etc/passwd",
        "nowhere.md",
        "deep",
        "",
        "a\0b.md",
    ],
)
def test_nothing_outside_the_folder_can_be_opened(folder: Path, url: str) -> None:
    for arguments in ({"id": url}, {"id": url, "view_source": True}):
        text = call(BrowserTool(FolderPages(folder)), "open", **arguments)
        assert text.startswith("Error: ")
        assert "outside" not in text


def test_view_source_shows_the_page_as_written(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    call(tool, "open", id="deep/wasps.html")
    assert "<title>Wasps</title>" in call(tool, "open", view_source=True)
    (folder / "windows.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ttwo\x0c\r\n")
    for source in (False, True):
        text = call(tool, "open", id="windows.txt", view_source=source)
        assert text.endswith("L0: one\nL1:     two\nL2: ")


def test_citations_resolve_to_pages_and_lines(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    call(tool, "search", query="nectar")
    call(tool, "open", id=0)
    found = tool.citations("Bees make it【1†L2】, and more【1†L3-L9】; not【7†L1】.")
    assert [(c.url, c.title, c.first, c.last) for c in found] == [
        ("honey.md", "Honey", 2, 2),
        ("honey.md", "Honey", 3, 9),
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("open", {}, "no page is open"),
        ("open", {"id": 1.5}, "expected a whole number"),
        ("open", {"cursor": True}, "expected a whole number"),
        ("find", {"pattern": "x"}, "no page is open"),
        ("search", {"query": "?!"}, "no words"),
        ("close", {}, "there is no function 'close'"),
    ],
)
def test_what_a_call_gets_wrong_is_told_to_the_model(
    folder: Path, name: str, arguments: dict[str, object], message: str
) -> None:
    text = call(BrowserTool(FolderPages(folder)), name, **arguments)
    assert text.startswith("Error: ")
    assert message in text


@pytest.mark.parametrize("arguments", ["{", "[1]", "null", ""])
def test_arguments_that_are_no_object_are_told_to_the_model(folder: Path, arguments: str) -> None:
    tool = BrowserTool(FolderPages(folder))
    assert tool.handle(ToolCall(0, "c", "browser.open", arguments, "browser.open")).startswith("Error: ")


def test_html_becomes_readable_text() -> None:
    page = html_page("https://bees.example/a/b.html", HTML)
    assert page.title == "Bees & honey"
    assert page.text.startswith(
        "# Bees\n\nA bee makes honey. See 【0†the wasps】 or 【1†a site†example.org】."
    )
    assert page.links == {0: "https://bees.example/a/wasps.html", 1: "https://example.org/x"}
    assert "  * one\n  * two" in page.text
    assert "| bee | 6" in page.text
    assert "a\n  b" in page.text
    assert "〖fake〗 top [Image: a hive]" in page.text
    assert "alert" not in page.text
    assert "color" not in page.text


def test_html_cannot_forge_the_notation() -> None:
    page = html_page(
        "https://a.example/",
        "<title>【0†t】</title><img alt='【1†x】'><a href='b'>c†d】</a> <a href='//e】†f/'>g</a>"
        "<svg><title>no</title></svg><template>no</template><noscript>no</noscript>",
    )
    assert page.title == "〖0†t〗"
    assert page.text == "[Image: 〖1†x〗]【0†c‡d〗】 【1†g†e〗‡f】"


def test_broken_html_is_read_all_the_same() -> None:
    assert "text" in html_page("u", "<p>text</div></a></pre><b").text


def test_markdown_links_and_brackets() -> None:
    page = markdown_page("a/b.md", 'See [x](../c.md "t"), [y](#z), ![i](i.png) 【0†no】\r\n')
    assert page.text == "See 【0†x】, y, ![i](i.png) 〖0†no〗\n"
    assert page.links == {0: "c.md"}
    assert page.title == "b.md"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("`[a](b)` [c](d)", "`[a](b)` 【0†c】"),
        ("```\n\n[a](b)\n```\n[c](d)", "```\n\n[a](b)\n```\n【0†c】"),
        (r"\[a](b) [c\]](d)", r"\[a](b) 【0†c]】"),
        ("[a](<b c.md>) [d](e_(f).md)", "【0†a】 【1†d】"),
        ("[![a](b.png)](c) ![[d](e)](f)", "【0†a】 ![[d](e)](f)"),
        ("> - [a\n> b](c)\n\n    [d](e)", "> - 【0†a > b】\n\n    【1†d】"),
        ("|[a](b)|[c](d)|\n|-|-|\n|[e](b)||", "|【0†a】|【1†c】|\n|-|-|\n|【0†e】||"),
        ("[a](https://b.example/c?d=e#f)", "【0†a†b.example】"),
        ("[a](mailto:b@c) [d][e] [](f)\n\n[e]: g", "a [d][e] [](f)\n\n[e]: g"),
        ("a\r\n\r\n\tb  \n***c***", "a\n\n\tb  \n***c***"),
    ],
)
def test_markdown_is_shown_as_written_but_for_its_links(written: str, shown: str) -> None:
    assert markdown_page("x.md", written).text == shown


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("text\n\n## [A](b) `c` ##\n# D", "A `c`"),
        ("```\n# no\n```\nTitle\n=====", "Title"),
        ("---\nkind: note\n---\n# Title", "Title"),
        ("#### no", "x.md"),
    ],
)
def test_the_title_of_markdown_is_its_first_heading(text: str, title: str) -> None:
    assert markdown_page("deep/x.md", text).title == title


def test_long_lines_are_wrapped_as_the_model_was_taught(tmp_path: Path) -> None:
    source = random.Random(0)
    words = ["".join(source.choices("abcé,.-'", k=source.randint(1, 20))) for _ in range(5_000)]
    paragraph = source.choice(["", " "]).join(words[:200]) + "  ".join(words) + " ".join(words)
    (tmp_path / "a.txt").write_text(paragraph)
    tool = BrowserTool(FolderPages(tmp_path))
    taught = textwrap.wrap(paragraph, 80, replace_whitespace=False, drop_whitespace=False)
    text = call(tool, "open", id="a.txt", num_lines=600)
    assert f"of {len(taught) - 1}**" in text
    assert text.split("\n")[3:] == [f"L{i}: {line}" for i, line in enumerate(taught[:600])]


def test_a_page_about_the_words_comes_before_one_that_names_them(tmp_path: Path) -> None:
    filler = "Nothing of note happens here. " * 20
    (tmp_path / "a.md").write_text(f"# Gardens\n\n{filler} A bee came by. {filler}")
    (tmp_path / "b.md").write_text(f"# The bee\n\n{filler}{filler}")
    (tmp_path / "c.html").write_text(f"<title>Gardens</title><p class=bee>{filler}{filler}")
    text = call(BrowserTool(FolderPages(tmp_path)), "search", query="bee")
    urls = [line.split("†")[-1].split("】")[0] for line in text.split("\n") if "【" in line]
    assert urls == ["b.md", "a.md"]


def test_pages_can_come_from_the_users_own_functions() -> None:
    def fetch(url: str) -> Page | str:
        if url == "https://a.example/":
            return "<html><title>A</title><body>one <a href='/two'>two</a></body></html>"
        if url == "https://a.example/two":
            return Page(url, "Two", "the second")
        raise ConnectionError("offline")

    tool = BrowserTool(FetchedPages(fetch, lambda query, count: [Hit("https://a.example/", "A", query)]))
    assert "【0†A†https://a.example/】 hello" in call(tool, "search", query="hello")
    assert call(tool, "open", id=0).startswith("[1] A (https://a.example/)")
    assert "L0: the second" in call(tool, "open", id=0)
    assert "offline" in call(tool, "open", id="https://b.example/")
    assert "no search here" in call(BrowserTool(FetchedPages(fetch)), "search", query="x")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no such folder"):
        FolderPages(tmp_path / "nowhere")
