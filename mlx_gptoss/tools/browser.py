"""The `browser` tool: search, open and find over pages, in the form gpt-oss was trained on.

Every display is kept and has a number, its cursor: `[3] Title (url)`, then the lines shown, each with its
number. The model cites them as `【3†L7-L9】`; `BrowserTool.citations` resolves what it cites.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_gptoss.tools.markup import LINK, Page
from mlx_gptoss.tools.pages import Hit, PageError, Pages

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ToolCall, ToolNamespace

WIDTH = 80  # characters of a line
VIEW = 4096  # characters of a page shown at once, about 1,000 tokens
MAX_MATCHES = 50
MATCH_LINES = 4  # shown for a match
LINES_BEFORE = 4  # shown before the place a link points to
_CITATION = re.compile(r"【(\d+)†L(\d+)(?:-L?(\d+))?[^】]*】")


@dataclass(frozen=True)
class Citation:
    """What `text` in an answer refers to: lines first to last (from 0) of a page."""

    text: str
    url: str
    title: str
    first: int
    last: int


@dataclass(frozen=True)
class _Display:
    page: Page
    lines: tuple[str, ...]
    places: dict[int, int]  # of a page of results: link id -> line of the page it leads to
    is_results: bool = False


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
            arguments = json.loads(call.arguments or "{}")
            if not isinstance(arguments, dict):
                raise PageError("the arguments are no JSON object")
            if name == "search":
                return self.search(str(arguments.get("query", "")), _whole(arguments, "topn", 10))
            if name == "open":
                return self._open_call(arguments)
            if name == "find":
                return self.find(str(arguments.get("pattern", "")), _whole(arguments, "cursor", -1))
            raise PageError(f"there is no function {name!r}: use search, open or find")
        except ValueError:
            return "Error: the arguments are not valid JSON"
        except PageError as error:
            return f"Error: {error}"

    def search(self, query: str, count: int = 10) -> str:
        """Display the best pages for a query."""
        hits = self._pages.search(query, max(1, min(count, 50)))
        page = _results_page(query, hits)
        self._displays.append(_Display(page, _wrap(page.text), {}, is_results=True))
        return self._show(0, -1)

    def open(self, target: int | str = -1, *, cursor: int = -1, line: int = -1, count: int = -1) -> str:
        """Display a page: link `target` of display `cursor`, or a URL, or with -1 that display itself."""
        place = 0
        if isinstance(target, str):
            display = self._display_of(self._pages.fetch(target))
        else:
            current = self._at(cursor)
            if target < 0:
                display = current
            elif target in current.page.links:
                place = max(0, current.places.get(target, 0) - LINES_BEFORE)
                display = self._display_of(self._pages.fetch(current.page.links[target]))
            else:
                raise PageError(f"display {self._number(cursor)} has no link {target}")
        self._check_line(display, line)
        self._displays.append(display)
        return self._show(line if line >= 0 else place, count)

    def view_source(self, target: int | str = -1, *, cursor: int = -1) -> str:
        """Display a page as it was written."""
        if isinstance(target, str):
            url = target
        else:
            current = self._at(cursor).page
            url = current.links.get(target, "") if target >= 0 else current.url
        if not url:
            raise PageError("this display has no source")
        self._displays.append(self._display_of(Page(url, f"Source of {url}", self._pages.source(url))))
        return self._show(0, -1)

    def find(self, pattern: str, cursor: int = -1) -> str:
        """Display where a text occurs in a page, whatever its case."""
        current = self._at(cursor)
        if current.is_results:
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
        text = "\n\n".join(parts) or f"No `find` results for pattern: `{pattern}`"
        page = Page(
            f"{current.page.url}/find?pattern={pattern}",
            f"Find results for text: `{pattern}` in `{current.page.title}`",
            text,
            {number: current.page.url for number in places},
        )
        self._displays.append(_Display(page, _wrap(text), places, is_results=True))
        return self._show(0, -1)

    def citations(self, answer: str) -> list[Citation]:
        """What an answer cites, in its order; citations of displays that do not exist are left out."""
        found = []
        for match in _CITATION.finditer(answer):
            number, first = int(match[1]), int(match[2])
            if number < len(self._displays):
                page = self._displays[number].page
                last = int(match[3]) if match[3] else first
                found.append(Citation(match[0], page.url, page.title, first, max(first, last)))
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

    def _number(self, cursor: int) -> int:
        return cursor if cursor >= 0 else len(self._displays) - 1

    def _display_of(self, page: Page) -> _Display:
        return _Display(page, _wrap(page.text), {})

    def _check_line(self, display: _Display, line: int) -> None:
        if line >= len(display.lines):
            raise PageError(f"there is no line {line}: the page's lines are 0 to {len(display.lines) - 1}")

    def _show(self, line: int, count: int) -> str:
        """The last display from a line on: `count` lines, or as many as fit a view."""
        display = self._displays[-1]
        end, size = line, 0
        while end < len(display.lines):
            size += len(display.lines[end]) + len(f"L{end}: ") + 1
            if end > line and (end - line >= count if count > 0 else size > VIEW):
                break
            end += 1
        title = display.page.title + (f" ({display.page.url})" if display.page.url else "")
        view = f"**viewing lines [{line} - {end - 1}] of {len(display.lines) - 1}**"
        body = "\n".join(f"L{i}: {display.lines[i]}" for i in range(line, end))
        return f"[{len(self._displays) - 1}] {title}\n{view}\n\n{body}"


def _results_page(query: str, hits: Sequence[Hit]) -> Page:
    lines = []
    for number, hit in enumerate(hits):
        title = hit.title.replace("†", "‡").replace("】", "〗") or hit.url
        lines.append(f"  * 【{number}†{title}†{hit.url}】 {hit.summary}".rstrip())
    text = "# Search Results\n\n" + ("\n".join(lines) or f"No results for `{query}`")
    return Page("", query, text, {number: hit.url for number, hit in enumerate(hits)})


def _wrap(text: str) -> tuple[str, ...]:
    wrapped: list[str] = []
    for line in text.split("\n"):
        line = line.expandtabs(4).rstrip()
        wrapped += textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]
    return tuple(wrapped)


def _whole(arguments: dict[str, Any], name: str, default: int) -> int:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise PageError(f"{name} is {value!r}: expected a whole number")
    return int(value)
