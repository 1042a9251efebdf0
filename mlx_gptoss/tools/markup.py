"""HTML and Markdown as the model reads them: text whose links are written `【id†text】`.

A link to another site reads `【id†text†domain】`; brackets of that kind in the page itself are replaced.
Pages may be hostile, so the parsers are lxml and markdown-it, and the work on one page is bounded.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import quote, unquote, urljoin, urlsplit

from lxml import etree
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline import link as link_rule
from markdown_it.token import Token

MAX_SIZE = 4 << 20  # bytes or characters of a page
MAX_MARKDOWN_LINES = 50_000  # of Markdown, parsed for links
MAX_MARKS = 150_000  # marks of Markdown at which the parser stops; each "[" counts as ten
MAX_EVENTS = 250_000  # tags and texts of HTML
MAX_DEPTH = 500  # of HTML: each stray end tag costs time in proportion to it
MAX_TITLE = 200
REST = "\n\n[The rest of the page is left out: there is too much of it.]"
LINK = re.compile(r"【\d+†([^†】]+)(?:†[^†】]+)?】")
_MARK = re.compile(r"[^\w\s]|\n")
_BRACKETS = str.maketrans({"【": "〖", "】": "〗"})
LABEL = str.maketrans({"【": "〖", "】": "〗", "†": "‡"})  # where the notation must not occur
_OPENING = {
    **dict.fromkeys(("p", "div", "section", "article", "header", "footer", "main", "table", "pre"), "\n\n"),
    **dict.fromkeys(("ul", "ol", "dl", "blockquote", "figure", "form"), "\n\n"),
    **{f"h{level}": "\n\n" + "#" * level + " " for level in range(1, 7)},
    **dict.fromkeys(("br", "tr", "dt", "dd"), "\n"),
    **dict.fromkeys(("td", "th"), " | "),
    "li": "\n  * ",
}
_BLOCKS = frozenset(tag for tag, text in _OPENING.items() if text.startswith("\n\n"))
_SKIPPED = frozenset(("script", "style", "noscript", "template", "svg"))


@dataclass(frozen=True)
class Page:
    """A page as the model sees it. url: "" for pages that the browser makes itself."""

    url: str
    title: str
    text: str
    links: dict[int, str] = field(default_factory=dict)


def markdown_page(url: str, text: str) -> Page:
    """A page from Markdown or plain text, as it was written but for its links.

    The title is its first heading, or the URL's last part.
    """
    lines = text[:MAX_SIZE].translate(_BRACKETS).replace("\r\n", "\n").split("\n")
    blocks: list[Token] = []
    _MARKDOWN.block.parse("\n".join(lines[:MAX_MARKDOWN_LINES]), _MARKDOWN, {}, blocks)
    links = _Links(url)
    title = ""
    parts: list[str] = []
    at = marks = 0
    for before, block in pairwise(blocks):
        if block.type != "inline" or block.map is None:
            continue
        if not title and before.type == "heading_open" and before.markup in ("#", "##", "###", "="):
            title = LINK.sub(r"\1", _with_links(block.content[:MAX_TITLE], links))
        if "](" in block.content:
            marks += len(_MARK.findall(block.content)) + 9 * block.content.count("[")
            if marks > MAX_MARKS:
                break
            first, end = block.map
            parts += [*lines[at:first], _with_links("\n".join(lines[first:end]), links)]
            at = end
    shown = "\n".join(parts + lines[at:])
    rest = REST if len(text) > MAX_SIZE else ""
    return Page(url, title or url.rstrip("/").rsplit("/", 1)[-1], shown + rest, links.targets)


def html_page(url: str, html: str) -> Page:
    """A page from HTML: headings, paragraphs, lists, tables and code as plain text."""
    reader = _HtmlReader(url)
    parser = etree.HTMLParser(target=reader, encoding="utf-8")
    data = html[:MAX_SIZE].encode("utf-8", "replace")
    rest = REST if len(html) > MAX_SIZE else ""
    for at in range(0, len(data) + 1, 4096):  # lxml stops at nothing but the end of what it is fed
        if reader.depth > MAX_DEPTH or reader.events > MAX_EVENTS:
            rest = REST
            break
        parser.feed(data[at : at + 4096])
    else:
        parser.close()
    text = re.sub(r"\n(?:[ \t]*\n)+", "\n\n", "\n" + "".join(reader.pieces)).strip("\n").rstrip()
    title = " ".join("".join(reader.title).split())[:MAX_TITLE].translate(_BRACKETS)
    return Page(url, title or url, text + rest, reader.links.targets)


class _Links:
    """Numbers the links of a page. base: its URL, or its path in a folder."""

    def __init__(self, base: str) -> None:
        self._base = base if "://" in base else quote(base, errors="replace")
        self._ids: dict[str, int] = {}
        self.targets: dict[int, str] = {}

    def show(self, target: str, text: str) -> str:
        """The link in the model's notation; only its text where it leads nowhere."""
        text = " ".join(text.split()).translate(LABEL)
        try:
            url = urljoin(self._base, target)
            parts = urlsplit(url)
            here = urlsplit(self._base).netloc
        except ValueError:
            return text
        if target.startswith("#") or parts.scheme in ("mailto", "javascript", "data"):
            return text
        if not parts.scheme and not parts.netloc:
            url = unquote(parts.path, errors="surrogateescape")
        number = self._ids.setdefault(url, len(self._ids))
        self.targets[number] = url
        elsewhere = f"†{parts.netloc.translate(LABEL)}" if parts.netloc not in ("", here) else ""
        return f"【{number}†{text}{elsewhere}】"


def _with_links(source: str, links: _Links) -> str:
    """A paragraph of Markdown, its links in the model's notation."""
    tokens: list[Token] = []
    _MARKDOWN.inline.parse(source, _MARKDOWN, {}, tokens)
    parts: list[str] = []
    at = 0
    inside: list[Token] = []
    for token in tokens:
        if token.type == "link_open":
            inside = [token]
        elif token.type != "link_close":
            inside.append(token)
        elif label := "".join(part.content for part in inside[1:]):
            begin, end = inside[0].meta["span"]
            parts += [source[at:begin], links.show(str(inside[0].attrs["href"]), label)]
            at = end
    return "".join(parts) + source[at:]


def _link_with_span(state: StateInline, silent: bool) -> bool:
    """markdown-it's rule for links, whose token also tells where in the paragraph the link stands."""
    begin, before = state.pos, len(state.tokens)
    found = link_rule(state, silent)
    if found and not silent:
        opening = next(token for token in state.tokens[before:] if token.type == "link_open")
        opening.meta["span"] = begin, state.pos
    return found


# Only what tells links and titles from code. Lists and quotes stay lines of a paragraph; definitions of
# references are not read: markdown-it takes time quadratic in those that are broken.
_MARKDOWN = MarkdownIt("zero").enable(
    ["fence", "heading", "lheading", "escape", "backticks", "link", "image"]
)
_MARKDOWN.inline.ruler.at("link", _link_with_span)


class _HtmlReader:
    """Takes what lxml tells of a page, its tags balanced, and makes pieces of text of it."""

    def __init__(self, url: str) -> None:
        self.pieces: list[str] = []
        self.title: list[str] = []
        self.links = _Links(url)
        self.depth = self.events = 0
        self._inside: Counter[str] = Counter()
        self._link: tuple[str, int] | None = None  # its target, and where its text begins in pieces

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        self.events += 1
        self._inside[tag] += 1
        self.pieces.append(_OPENING.get(tag, ""))
        if tag == "img" and attributes.get("alt"):
            self.data(f"[Image: {attributes['alt']}]")
        elif tag == "a" and attributes.get("href"):
            self._link = (attributes["href"], len(self.pieces))

    def end(self, tag: str) -> None:
        self.depth -= 1
        self._inside[tag] -= 1
        if tag in _BLOCKS:
            self.pieces.append("\n\n")
        elif tag == "a" and self._link is not None:
            target, begin = self._link
            text = "".join(self.pieces[begin:])
            del self.pieces[begin:]
            self._link = None
            if text.strip():
                self.events += 4  # what resolving its target takes
                self.pieces.append(self.links.show(target, text))

    def data(self, data: str) -> None:
        self.events += 1
        if any(self._inside[tag] for tag in _SKIPPED):
            return
        if self._inside["title"]:
            self.title.append(data)
        else:
            data = data.translate(_BRACKETS)
            self.pieces.append(data if self._inside["pre"] else re.sub(r"\s+", " ", data))

    def close(self) -> None:
        """Lxml asks for it."""
