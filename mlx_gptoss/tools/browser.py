"""The `browser` tool: search, open and find over pages, in the form gpt-oss was trained on.

Every display is kept and has a number, its cursor: `[3] Title (url)`, then the lines shown, each with its
number. The model cites them as `【3†L7-L9】`; `BrowserTool.citations` resolves what it cites.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mlx_gptoss.tools.markup import LABEL, LINK, MAX_TITLE, REST, Page
from mlx_gptoss.tools.pages import PageError, Pages, Results, quoted

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ToolCall, ToolNamespace

WIDTH = 80  # characters of a line
VIEW = 4096  # characters of a page shown at once, about 1,000 tokens
MAX_VIEW = 16 * VIEW  # where a number of lines is asked for
MAX_LINES = 100_000  # of a page
MAX_MATCHES = 50
MATCH_LINES = 4  # shown for a match
LINES_BEFORE = 4  # shown before the place a link points to
_CITATION = re.compile(r"【(\d{1,9})†L(\d{1,9})(?:-L?(\d{1,9}))?[^【】]*】")
_PIECE = re.compile(r".{1,4000} |.{1,4000}")
_CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)} - {9, 10}, "\ufffd")


@dataclass(frozen=True)
class Citation:
    """What `text` in an answer refers to: lines first to last (from 0) of a page."""

    text: str
    url: str
    title: str
    first: int
    last: int


class _Display:
    """A page as it is shown: without control characters, in a limited number of lines."""

    def __init__(self, page: Page, places: dict[int, int] | None = None) -> None:
        self.url = _clean(page.url)
        self.title = " ".join(_clean(page.title).split())[:MAX_TITLE]
        self.links = page.links
        self.lines = list(islice(_wrapped(page.text), MAX_LINES + 1))
        if len(self.lines) > MAX_LINES:
            self.lines[MAX_LINES] = REST.strip()
        self.places = places  # of a page of results: link id -> line of the page it leads to


class BrowserTool:
    """A browser over `pages` (a folder, or the user's own functions). Keeps every display until `close`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._displays: list[_Display] = []

    @property
    def namespace(self) -> ToolNamespace:
        """As the model was taught it."""
        from mlx_gptoss.harmony import BROWSER

        return BROWSER

    def handle(self, call: ToolCall) -> str:
        """What the browser displays, or why it cannot."""
        name = call.name.rsplit(".", 1)[-1]
        try:
            arguments = _parsed(call.arguments)
            if name == "search":
                return self.search(str(arguments.get("query", "")), _whole(arguments, "topn", 10))
            if name == "open":
                return self._open_call(arguments)
            if name == "find":
                return self.find(str(arguments.get("pattern", "")), _whole(arguments, "cursor", -1))
            raise PageError(f"there is no function {quoted.repr(name)}: use search, open or find")
        except PageError as error:
            return _clean(f"Error: {error}")

    def search(self, query: str, count: int = 10) -> str:
        """Display the best pages for a query."""
        results = self._pages.search(query, max(1, min(count, 50)))
        return self._show(_Display(_results_page(query, results), {}))

    def open(self, target: int | str = -1, *, cursor: int = -1, line: int = -1, count: int = -1) -> str:
        """Display a page: link `target` of display `cursor`, or a URL, or with -1 that display itself."""
        place = 0
        if isinstance(target, str):
            display = _Display(self._pages.fetch(target))
        else:
            display = current = self._at(cursor)
            if target >= 0:
                if target not in current.links:
                    number = cursor if cursor >= 0 else len(self._displays) - 1
                    raise PageError(f"display {number} has no link {target}")
                place = max(0, (current.places or {}).get(target, 0) - LINES_BEFORE)
                display = _Display(self._pages.fetch(current.links[target]))
        return self._show(display, line if line >= 0 else place, count)

    def view_source(self, target: int | str = -1, *, cursor: int = -1) -> str:
        """Display a page as it was written."""
        if isinstance(target, str):
            url = target
        else:
            current = self._at(cursor)
            url = current.links.get(target, "") if target >= 0 else current.url
        if not url:
            raise PageError("this display has no source")
        return self._show(_Display(Page(url, f"Source of {url}", self._pages.source(url))))

    def find(self, pattern: str, cursor: int = -1) -> str:
        """Display where a text occurs in a page, whatever its case."""
        current = self._at(cursor)
        if current.places is not None:
            raise PageError("find works on a page, not on a list of results: open one first")
        if not pattern:
            raise PageError("the pattern is empty")
        lines = [LINK.sub(r"\1", line) for line in current.lines]
        parts: list[str] = []
        places: dict[int, int] = {}
        at = 0
        while at < len(lines) and len(parts) < MAX_MATCHES:
            if pattern.lower() in lines[at].lower():
                places[len(parts)] = at
                shown = "\n".join(lines[at : at + MATCH_LINES])
                parts.append(f"# 【{len(parts)}†match at L{at}】\n{shown}")
                at += MATCH_LINES
            else:
                at += 1
        pattern = pattern[:MAX_TITLE]
        page = Page(
            f"{current.url}/find?pattern={pattern}",
            f"Find results for text: `{pattern}` in `{current.title}`",
            "\n\n".join(parts) or f"No `find` results for pattern: `{pattern}`",
            dict.fromkeys(places, current.url),
        )
        return self._show(_Display(page, places))

    def citations(self, answer: str) -> list[Citation]:
        """What an answer cites, in its order; citations of displays that do not exist are left out."""
        found = []
        for match in _CITATION.finditer(answer):
            number, first = int(match[1]), int(match[2])
            if number < len(self._displays):
                display = self._displays[number]
                last = int(match[3]) if match[3] else first
                found.append(Citation(match[0], display.url, display.title, first, max(first, last)))
        return found

    def close(self) -> None:
        """Forget all displays."""
        self._displays.clear()

    def _open_call(self, arguments: dict[str, Any]) -> str:
        target = arguments.get("id", -1)
        if not isinstance(target, str):
            target = _whole(arguments, "id", -1)
        cursor = _whole(arguments, "cursor", -1)
        if arguments.get("view_source") is True:
            return self.view_source(target, cursor=cursor)
        line, count = _whole(arguments, "loc", -1), _whole(arguments, "num_lines", -1)
        return self.open(target, cursor=cursor, line=line, count=count)

    def _at(self, cursor: int) -> _Display:
        if not self._displays:
            raise PageError("no page is open: search for one, or open one by its URL")
        if cursor >= len(self._displays):
            raise PageError(f"there is no display {cursor}: they are numbered 0 to {len(self._displays) - 1}")
        return self._displays[cursor if cursor >= 0 else -1]

    def _show(self, display: _Display, line: int = 0, count: int = -1) -> str:
        """Keep a display, and show it from a line on: `count` lines, or as many as fit a view."""
        lines = display.lines
        if line >= len(lines):
            raise PageError(f"there is no line {line}: the page's lines are 0 to {len(lines) - 1}")
        self._displays.append(display)
        end, size = line, 0
        while end < len(lines):
            size += len(lines[end]) + len(f"L{end}: ") + 1
            if end > line and (end - line == count or size > (MAX_VIEW if count > 0 else VIEW)):
                break
            end += 1
        title = display.title + (f" ({display.url})" if display.url else "")
        view = f"**viewing lines [{line} - {end - 1}] of {len(lines) - 1}**"
        body = "\n".join(f"L{i}: {lines[i]}" for i in range(line, end))
        return f"[{len(self._displays) - 1}] {title}\n{view}\n\n{body}"


def _results_page(query: str, results: Results) -> Page:
    lines = []
    for number, hit in enumerate(results.hits):
        title = " ".join(hit.title.translate(LABEL).split()) or hit.url
        lines.append(f"  * 【{number}†{title}†{hit.url}】 {hit.summary}".rstrip())
    text = "# Search Results\n\n" + ("\n".join(lines) or f"No results for `{query}`")
    if results.left_out:
        text += f"\n\nLeft out: {results.left_out}."
    return Page("", query, text, {number: hit.url for number, hit in enumerate(results.hits)})


def _wrapped(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        line = _clean(line.expandtabs(4).rstrip())
        if len(line) <= WIDTH:
            yield line
            continue
        rest = ""
        for piece in _PIECE.findall(line):  # textwrap's time is quadratic in the length of a line
            *full, rest = textwrap.wrap(rest + piece, WIDTH, replace_whitespace=False, drop_whitespace=False)
            yield from full
        yield rest


def _clean(text: str) -> str:
    """Control characters other than tabs and newlines, and lone surrogates, are replaced."""
    return text.translate(_CONTROL)


def _parsed(arguments: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        raise PageError("the arguments are no JSON that can be read") from None
    if not isinstance(parsed, dict):
        raise PageError("the arguments are no JSON object")
    return parsed


def _whole(arguments: dict[str, Any], name: str, default: int) -> int:
    value = arguments.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    if not number or value != int(value):
        raise PageError(f"{name} is {quoted.repr(value)}: expected a whole number of at most 9 digits")
    return int(value)
