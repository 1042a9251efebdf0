"""Pages and folders made to harm: a call is answered with text, soon, and nothing is shown raw."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gptoss.harmony import ToolCall
from mlx_gptoss.tools import pages
from mlx_gptoss.tools.browser import BrowserTool
from mlx_gptoss.tools.pages import FetchedPages, FolderPages, Hit, Page
from tests.support.endless import ends

KIB = 1024
FILLER = "".join(chr(c) for c in range(0xC0, 0x250))

HTML = {
    "unclosed tags": "<a " * 20_000,
    "comments": "<!--" * 40_000,
    "brackets": "[" * 1024 * KIB,
    "depth": "<div>" * 100_000,
    "depth and stray ends": "<div>" * 20_000 + "</p>" * 20_000,
    "depth and other ends": "<div>" * 20_000 + "</span>" * 20_000,
    "framesets": "<body><frameset>" * 20_000,
    "formatting": "<p>" + "".join(f"<b a{i}>" for i in range(2_000)) + "<p>x" * 20_000,
    "misnested": "<b><p></b>" * 10_000,
    "links": "<a href=x>y" * 5_000,
    "many links": "".join(f"<a href=x{i}>y</a>" for i in range(5_000)),
    "nested lists": "<ul><li>" * 40_000,
    "rows": "<table>" + "<tr><td>1<td>2" * 5_000,
    "tables": "<table><tr><td>" * 10_000,
    "attributes": "<a " + " ".join(f"a{i}" for i in range(40_000)) + ">",
    "entities": "&amp;&#0;&#x1b;&bogus;&" * 5_000,
    "title": "<title>" + "x &amp; " * 10_000,
    "nul": "\0" * 32 * KIB,
    "less-than": "<" * 32 * KIB,
    "blanks": "<pre>" + ("\n" + " " * 500) * 500 + "x",
    "scripts": "<script><!--<script>" * 15_000,
    "one word": "<p>" + "x" * 1024 * KIB,
    "tabs": "<pre>" + "\t" * 256 * KIB + "x",
}
MARKDOWN = {
    "brackets": "[" * 1024 * KIB,
    "brackets, one link": "[" * 256 * KIB + "](x)",
    "brackets in lines": "[\n" * 32 * KIB + "[a](b)",
    "half links": "[a](" * 48 * KIB,
    "half images": "![a](<" * 40 * KIB,
    "links": "[a](b)" * 40 * KIB,
    "many links": "".join(f"[a{i}](b{i})\n\n" for i in range(4_000)),
    "nested links": ("[a" * 50 + "](b)" * 50 + "\n") * 200,
    "references": "[a]: b\n" * 6_000 + "[a](b)",
    "quotes": ">" * 20_000 + "[a](b)",
    "quoted lines": ">\n" * 32 * KIB,
    "lists": "- " * 64 * KIB + "[a](b)",
    "heading": "# a" + " " * 40_000 + "b",
    "hashes": "#" * 256 * KIB,
    "backticks": "".join("`" * i + "[a](b) " for i in range(700)),
    "escapes": "\\" * 256 * KIB + "[a](b)",
    "table": "|a|b|\n|-|-|\n" + "|[x](y)|z|\n" * 3_000,
    "short paragraphs": "a\n\n" * 16 * KIB,
    "underlined": "a\n=\n" * 12 * KIB,
    "rules": "---\n" * 12 * KIB,
    "fences": "```\n" * 12 * KIB + "[a](b)",
    "titles": '[a](b "' * 40 * KIB,
    "nul": "\0" * 256 * KIB,
    "one word": "x" * 1024 * KIB,
    "hyphens": "a-" * 64 * KIB,
    "tabs": "\t" * 256 * KIB + "x",
    "blanks": " " * 1024 * KIB + "x",
    "notation": "【1†" * 32 * KIB,
    "letters": FILLER * 200,
}
CASES = [(kind, name) for kind, named in (("html", HTML), ("md", MARKDOWN)) for name in named]


@pytest.fixture(autouse=True)
def _everything_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Most of these pages would take hours if their length counted twice; a busy machine cuts no search."""
    monkeypatch.setattr(pages, "SEARCH_SECONDS", 3600.0)
    with ends():
        yield


def call(tool: BrowserTool, name: str, **arguments: object) -> str:
    """The result, which must hold no control characters."""
    text = tool.handle(ToolCall(0, "c", f"browser.{name}", json.dumps(arguments), f"browser.{name}"))
    assert all(c in "\n\t" or (c >= " " and not "\x7f" <= c < "\xa0") for c in text)
    text.encode()  # no lone surrogates
    return text


def results(text: str) -> list[str]:
    """The URLs that a display of results lists."""
    return [part.split("】")[0].split("†")[-1] for part in text.split("【")[1:]]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_hostile_page_is_found_opened_and_searched_in_time(tmp_path: Path, kind: str, name: str) -> None:
    page = tmp_path / f"page.{kind}"
    page.write_text((HTML if kind == "html" else MARKDOWN)[name])
    tool = BrowserTool(FolderPages(tmp_path))
    assert results(call(tool, "search", query="page")) == [page.name]
    assert call(tool, "open", id=0).startswith("[1] ")
    assert call(tool, "find", pattern="a b").startswith("[2] ")


@pytest.mark.parametrize("kind", ["html", "md"])
def test_bytes_that_are_no_text_are_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(
        b"bees \xff\xfe\x80 \x00\x1b[31m\x07\x9b red \xc2\x85 \xed\xa0\x80 [x](\x1b)"
    )
    tool = BrowserTool(FolderPages(tmp_path))
    assert f"a.{kind}" in call(tool, "search", query="bees")
    assert "bees \ufffd" in call(tool, "open", id=0)
    assert "red" in call(tool, "open", id=f"a.{kind}", view_source=True)
    assert "match at L0" in call(tool, "find", pattern="RED")


def test_a_long_page_is_shown_up_to_a_limit_that_is_told(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(("honey " * 12 + "\n") * 60_000)
    tool = BrowserTool(FolderPages(tmp_path))
    assert "long.txt" in tool.handle(ToolCall(0, "c", "browser.search", '{"query": "honey"}', ""))
    first = tool.handle(ToolCall(0, "c", "browser.open", '{"id": "long.txt"}', ""))
    last = int(first.split("] of ")[1].split("**")[0])
    assert last > 50_000
    assert "left out" in call(tool, "open", loc=last)
    assert len(call(tool, "open", loc=0, num_lines=10**6)) < 100_000


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


NO_PAGES: dict[str, Callable[[Path], None]] = {
    "dangling.md": link("nowhere.md"),
    "loop.md": link("loop.md"),
    "outside.md": link("../outside/secret.md"),
    "outside": link("../outside"),
    "device.md": link("/dev/zero"),
    "folder.md": Path.mkdir,
    "fifo.md": os.mkfifo,
    "socket.md": bound_socket,
}
ODD_NAMES = (
    ["C#.md", "100%25.md", "100%.md", "a?b.md", "what?.html", "sp ace.md", "http:x.md", "a&b=c.md", "é.md"]
    + ["【1†x】.md", "new\nline.md", "esc\x1b[31m%41.md", os.fsdecode(b"latin-\xe9.md")]
)  # fmt: skip
ODD_PAGES = {
    "link.md": "bees [x](http://[) [y](http://a]b/) [z](//[::1) <http://[>",
    "link.html": "bees <a href='http://['>x</a> <a href='//[::1'>y</a> <a href='http://\u2100/'>z</a>",
    "empty.md": "",
    "empty.html": "",
    "blank.html": " ",
    "comment.html": "<!-- bees",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good page, and another beside it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.md").write_text("bees outside")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "good.md").write_text("bees")
    return tmp_path / "pages"


@pytest.mark.parametrize("name", NO_PAGES)
def test_what_is_no_page_is_refused_and_hides_no_other(folder: Path, name: str) -> None:
    NO_PAGES[name](folder / name)
    tool = BrowserTool(FolderPages(folder))
    assert results(call(tool, "search", query="bees")) == ["good.md"]
    for path in (name, f"{name}/secret.md"):
        for source in (False, True):
            assert call(tool, "open", id=path, view_source=source).startswith("Error: there is no page")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_page_of_any_name_is_found_opened_and_linked(folder: Path, name: str) -> None:
    try:
        (folder / name).write_text("bees galore")
    except OSError:
        pytest.skip("this file system takes no such name")
    (folder / "deep").mkdir()
    (folder / "deep" / "links.md").write_text(f"[a](../{quote(os.fsencode(name))}#top)")
    tool = BrowserTool(FolderPages(folder))
    found = results(call(tool, "search", query="bees galore"))
    assert len(found) == 2
    assert "bees galore" in call(tool, "open", id=0)
    assert "bees galore" in call(tool, "open", id=found[0])
    call(tool, "open", id="deep/links.md")
    assert "bees galore" in call(tool, "open", id=0)


def test_names_that_look_like_one_another_are_told_apart(folder: Path) -> None:
    (folder / "100%.md").write_text("bees once [x](100%25.md) [y](100%2525.md)")
    (folder / "100%25.md").write_text("bees twice")
    tool = BrowserTool(FolderPages(folder))
    assert {"100%.md", "100%25.md"} < {*results(call(tool, "search", query="bees"))}
    assert "bees twice" in call(tool, "open", id="100%25.md")
    for number, text in enumerate(("bees once", "bees twice")):
        call(tool, "open", id="100%.md")
        assert text in call(tool, "open", id=number)


@pytest.mark.parametrize("name", ODD_PAGES)
def test_an_odd_page_can_be_opened_and_hides_no_other(folder: Path, name: str) -> None:
    (folder / name).write_text(ODD_PAGES[name])
    tool = BrowserTool(FolderPages(folder))
    assert "good.md" in results(call(tool, "search", query="bees"))
    assert call(tool, "open", id=name).startswith("[1] ")


def test_a_page_that_cannot_be_read_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "locked.md").write_text("bees")
    opened = os.open

    def locked(path: str, flags: int, *args: int) -> int:
        if path.endswith("locked.md"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", locked)  # a mode does not keep root out
    tool = BrowserTool(FolderPages(folder))
    text = call(tool, "search", query="bees")
    assert results(text) == ["good.md"]
    assert "Left out: 1 file that cannot be read." in text
    assert "'locked.md' cannot be read (Permission denied)" in call(tool, "open", id="locked.md")


def test_a_file_that_vanishes_while_the_folder_is_searched_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.md", "b.md", "c.md"):
        (tmp_path / name).write_text("bees")
    stat = os.stat

    def vanish(path: str, *args: object, **options: object) -> os.stat_result:
        if os.fspath(path).endswith("b.md"):
            (tmp_path / "b.md").unlink(missing_ok=True)
        return stat(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", vanish)
    text = call(BrowserTool(FolderPages(tmp_path)), "search", query="bees")
    assert results(text) == ["a.md", "c.md"]
    assert "1 file that cannot be read" in text


def test_a_folder_of_thousands_of_files_is_searched_in_time(tmp_path: Path) -> None:
    for number in range(2_000):
        (tmp_path / f"{number:04}.md").write_text(
            f"# Note {number}\n\nAbout bees and [more](x.md).\n" + "text " * 60
        )
    (tmp_path / "rare.txt").write_text("bees and nectar")
    assert (
        results(call(BrowserTool(FolderPages(tmp_path)), "search", query="nectar of bees", topn=3))[0]
        == "rare.txt"
    )


def test_folders_in_folders_are_searched_however_deep(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1_500):
            os.mkdir("d")
            os.chdir("d")
        Path("deepest.md").write_text("bees")
    finally:
        os.chdir(here)
    (tmp_path / "top.md").write_text("bees")
    assert "top.md" in results(call(BrowserTool(FolderPages(tmp_path)), "search", query="bees"))
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # too deep for pytest to clear away later


@pytest.mark.parametrize("name", ["id", "cursor", "loc", "num_lines"])
@pytest.mark.parametrize(
    "value", ["Infinity", "-Infinity", "NaN", "1e308", "1" + "0" * 4000, "0.5", "true", "[1]"]
)
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / "a.md").write_text("bees")
    tool = BrowserTool(FolderPages(tmp_path))
    call(tool, "open", id="a.md")
    text = tool.handle(ToolCall(0, "c", "browser.open", f'{{"{name}": {value}}}', "browser.open"))
    assert text.startswith(f"Error: {name} is ")
    assert "expected a whole number" in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "arguments", ["[" * 100_000, '{"id": 1' + "0" * 5000 + "}", "\x1b", '"\\ud800"', "null"]
)
def test_arguments_that_cannot_be_read_are_refused(tmp_path: Path, arguments: str) -> None:
    text = BrowserTool(FolderPages(tmp_path)).handle(
        ToolCall(0, "c", "browser.open", arguments, "browser.open")
    )
    assert text.startswith("Error: the arguments")


@pytest.mark.parametrize(
    "path",
    [
        "a" * 5000,
        "a/" * 2500,
        "../" * 2000 + "etc/passwd",
        "\ud800.md",
        "\x1b[31m",
        "a\0b",
        "%00",
        "%ff",
        "#",
        "?",
    ],
)
def test_paths_that_cannot_be_are_refused_in_a_few_words(tmp_path: Path, path: str) -> None:
    for source in (False, True):
        text = call(BrowserTool(FolderPages(tmp_path)), "open", id=path, view_source=source)
        assert text.startswith("Error: there is no page")
        assert len(text) < 500


def test_a_hostile_answer_is_read_in_time(folder: Path) -> None:
    tool = BrowserTool(FolderPages(folder))
    call(tool, "open", id="good.md")
    tool.citations("【0†L1" * 20_000 + "【0†L" + "9" * 5_000 + "】" + "【" + "0" * 5_000 + "†L1】")


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [
        ("SEARCH_SECONDS", 0.0, "10 files beyond the limits of a search"),
        ("MAX_SEARCHED", 30, "7 files beyond the limits of a search"),
        ("MAX_ENTRIES", 5, "all beyond 5 entries of the folder"),
    ],
)
def test_a_search_stops_at_its_limits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, told: str
) -> None:
    for number in range(10):
        (tmp_path / f"{number}.md").write_text("about bees")
    monkeypatch.setattr(pages, limit, value)
    assert f"Left out: {told}" in call(BrowserTool(FolderPages(tmp_path)), "search", query="bees")


def test_a_long_query_or_pattern_is_refused_or_shortened(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("bees")
    tool = BrowserTool(FolderPages(tmp_path))
    assert call(tool, "search", query="bees " * 10_000).startswith("Error: the query is longer than")
    call(tool, "open", id="a.md")
    assert len(call(tool, "find", pattern="bees " * 10_000)) < 1000


def test_what_the_users_functions_bring_is_cleaned_and_bounded() -> None:
    brought: dict[str, Page | str] = {
        "html": "<html><title>\x1b[31m</title>" + "<div>" * 100_000,
        "text": "[" * 1024 * KIB + "](x)",
        "page": Page("page\x1b", "a\n\x1b title", "\x07 bell \ud800"),
    }

    def fetch(url: str) -> Page | str:
        if url in brought:
            return brought[url]
        raise ValueError("no \x1b[31m such page")

    tool = BrowserTool(FetchedPages(fetch, lambda query, count: [Hit("page", "t\x1b\nt", "s\x1b")]))
    assert "【0†t" in call(tool, "search", query="x")
    for url in brought:
        assert call(tool, "open", id=url).startswith("[")
    assert call(tool, "open", id="none").startswith("Error: ")


PATHS = ("a.md", "b.html", "c.txt")
ARGUMENTS = st.dictionaries(
    st.sampled_from(
        ["id", "cursor", "loc", "num_lines", "query", "pattern", "topn", "view_source", "source"]
    ),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.integers(),
        st.floats(),
        st.sampled_from([*PATHS, "."]),
        st.text(),
        st.lists(st.integers(), max_size=2),
    ),
)
BYTES = st.one_of(
    st.binary(max_size=2000),
    st.text(max_size=2000).map(lambda text: text.encode("utf-8", "replace")),
    st.lists(
        st.sampled_from(
            [
                "<a href=x>",
                "</a>",
                "<p>",
                "<table>",
                "<td>",
                "<pre>",
                "<title>",
                "</",
                "<!--",
                "-->",
                "<script>",
            ]
            + ["&amp;", "&#0;", "[", "]", "](", ")", "](b)", "](<", "![", "# ", "=", "\n", "\n\n", "```", "`"]
            + ["> ", "- ", "【1†a】", "†", "http://[", "\t", "\0", "\x1b", " ", "word", "é"]
        ),
        max_size=300,
    ).map(lambda parts: "".join(parts).encode()),
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BYTES, st.lists(st.tuples(st.sampled_from(["search", "open", "find", "x"]), ARGUMENTS), max_size=6))
def test_any_bytes_and_any_call_are_answered_with_text(
    tmp_path: Path, content: bytes, calls: list[tuple[str, dict[str, object]]]
) -> None:
    for name in PATHS:
        (tmp_path / name).write_bytes(content)
    tool = BrowserTool(FolderPages(tmp_path))
    for name in PATHS:
        assert call(tool, "open", id=name).startswith("[")
    for name, arguments in calls:
        assert call(tool, name, **arguments).startswith(("[", "Error: "))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text())
def test_any_name_and_any_arguments_are_answered_with_text(tmp_path: Path, name: str, arguments: str) -> None:
    (tmp_path / "a.md").write_text("bees")
    tool = BrowserTool(FolderPages(tmp_path))
    assert tool.handle(ToolCall(0, "c", name, arguments, name)).startswith(("[", "Error: "))
