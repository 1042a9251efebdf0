"""Where the browser's pages come from: a local folder, or the user's own functions.

A folder may hold anything under any name: what is read and listed is bounded, and what is left out is told.
"""

from __future__ import annotations

import math
import os
import posixpath
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from reprlib import Repr
from typing import Protocol
from urllib.parse import quote, unquote

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.markup import LINK, MAX_SIZE, REST, html_page, markdown_page
from mlx_gptoss.tools.markup import Page as Page

SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".rst")
MAX_QUERY = 400  # characters
MAX_ENTRIES = 100_000  # of a folder and those below, listed for a search
BEGINNING = 200  # characters of a page
MAX_SEARCHED = 256 << 20  # characters, of all pages together
SEARCH_SECONDS = 4.0
_WORD = re.compile(r"\w+")
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff【】†]")  # in a name: not to be shown as it is
_AT_ONCE = os.O_NONBLOCK | os.O_NOFOLLOW
quoted = Repr()  # for what the model sent
quoted.maxstring = 200


class PageError(Exception):
    """A page cannot be had; the message is for the model."""


@dataclass(frozen=True)
class Hit:
    """One result of a search."""

    url: str
    title: str
    summary: str = ""


@dataclass(frozen=True)
class Results:
    """What a search found, best first; left_out: what it did not look at, in words."""

    hits: Sequence[Hit]
    left_out: str = ""


class Pages(Protocol):
    """Where pages come from."""

    def search(self, query: str, count: int) -> Results:
        """The best pages for a query. Raises PageError."""
        ...

    def fetch(self, url: str) -> Page:
        """The page at a URL. Raises PageError."""
        ...

    def source(self, url: str) -> str:
        """The page's text as it was written. Raises PageError."""
        ...


class FolderPages:
    """The text, Markdown and HTML files of a folder. A URL is a path relative to it, with "/".

    Files outside cannot be reached, neither by ".." nor through symbolic links; hidden files are left out.
    Raises ToolError when there is no such folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(os.path.realpath(folder))
        if not self._folder.is_dir():
            raise ToolError(f"{folder}: no such folder for the browser to read", "browser")

    def search(self, query: str, count: int) -> Results:
        """Ranked by BM25 (Robertson and Walker 1994: k1 = 1.2, b = 0.75, lengths in characters), the path and
        the beginning of a page, where its title is, counting four times.
        """
        words = sorted({*_WORD.findall(query.lower())})
        if not words:
            raise PageError("the query has no words")
        if len(query) > MAX_QUERY:
            raise PageError(f"the query is longer than {MAX_QUERY} characters: use fewer words")
        pattern = re.compile(rf"\b(?:{'|'.join(words)})\b")
        deadline = time.monotonic() + SEARCH_SECONDS
        names, left_out = self._names()
        found: list[tuple[str, Counter[str], int]] = []
        looked_at = read = size = 0
        for name in names:
            if size > MAX_SEARCHED or time.monotonic() > deadline:
                left_out.append(f"{_files(len(names) - looked_at)} beyond the limits of a search")
                break
            looked_at += 1
            try:
                text = f"{name}\n{self._searched(name)}".lower()
            except PageError:
                continue
            read += 1
            size += len(text)
            if any(word in text for word in words):
                title = text[: len(name) + BEGINNING]
                found.append((name, Counter(pattern.findall(text) + 3 * pattern.findall(title)), len(text)))
        if read < looked_at:
            left_out.append(f"{_files(looked_at - read)} that cannot be read")
        best = _ranked(found, read, size)[:count]
        hits = [hit for name in best if (hit := self._hit(name, pattern, deadline + 1))]
        return Results(hits, "; ".join(left_out))

    def fetch(self, url: str) -> Page:
        name, path = self._locate(url)
        text, rest = self._read(path, url)
        page = (html_page if _is_html(name) else markdown_page)(_url(name), text)
        return replace(page, text=page.text + rest)

    def source(self, url: str) -> str:
        return "".join(self._read(self._locate(url)[1], url))

    def _names(self) -> tuple[list[str], list[str]]:
        """The paths of the pages, those of upper folders first, and what is not among them, in words."""
        names: list[str] = []
        folders = [""]
        entries = unreadable = 0
        for folder in folders:  # grows on the way
            try:
                with os.scandir(self._folder / folder) as listing:
                    batch = list(islice(listing, MAX_ENTRIES - entries))
                    entries += len(batch)
                    for entry in sorted(batch, key=lambda entry: entry.name):
                        path = folder + entry.name
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(path + "/")
                        elif path.lower().endswith(SUFFIXES) and self._is_page(entry, path):
                            names.append(path)
            except OSError:
                unreadable += 1
            if entries == MAX_ENTRIES:
                break
        left_out = [f"{unreadable:,} folder(s) that cannot be read"] if unreadable else []
        left_out += [f"all beyond {MAX_ENTRIES:,} entries of the folder"] if entries == MAX_ENTRIES else []
        return names, left_out

    def _is_page(self, entry: os.DirEntry[str], name: str) -> bool:
        """Whether it is a file, or a link to a file in the folder."""
        if not entry.is_symlink():
            return entry.is_file()
        try:
            return bool(self._locate(name))
        except PageError:
            return False

    def _searched(self, name: str) -> str:
        """What a search looks at: the text of HTML with its title first, and other files as they are."""
        if not _is_html(name):
            return self.source(name)
        page = self.fetch(name)
        return f"{page.title}\n{page.text}"

    def _hit(self, name: str, pattern: re.Pattern[str], deadline: float) -> Hit | None:
        """A result; None if the page is gone, and only the name once time is up."""
        if time.monotonic() > deadline:
            return Hit(_url(name), _url(name))
        try:
            page = self.fetch(name)
        except PageError:
            return None
        return Hit(page.url, page.title, _summary(page.text, pattern))

    def _locate(self, url: str) -> tuple[str, str]:
        """The name and the real path of the file a URL means: a file's very name, or one that is encoded."""
        bare = url.removeprefix("file://")
        for name in (bare, unquote(re.split("[?#]", bare)[0], errors="surrogateescape")):
            name = posixpath.normpath(name.lstrip("/"))
            if any(part.startswith(".") for part in name.split("/")):
                continue
            try:
                path = os.path.realpath(self._folder / name)
                if Path(path).is_relative_to(self._folder) and stat.S_ISREG(os.stat(path).st_mode):
                    return name, path
            except (OSError, ValueError):  # no such file, or no possible name
                continue
        raise PageError(
            f"there is no page {quoted.repr(url)}: search for one, or use a path from the results"
        )

    def _read(self, path: str, url: str) -> tuple[str, str]:
        """The beginning of a file, and a note if there is more."""
        try:  # without waiting, should a pipe have taken the file's place
            with open(path, "rb", opener=lambda path, flags: os.open(path, flags | _AT_ONCE)) as file:
                data = file.read(MAX_SIZE + 1)
        except OSError as error:
            raise PageError(f"{quoted.repr(url)} cannot be read ({error.strerror})") from None
        return data[:MAX_SIZE].decode("utf-8-sig", "replace"), REST if len(data) > MAX_SIZE else ""


class FetchedPages:
    """Pages from functions of the user's: the package itself never opens a connection for the model.

    fetch: URL -> a Page, or its HTML or Markdown as text. search: (query, count) -> results. What they raise
    is shown to the model as the reason why there is no page.
    """

    def __init__(
        self,
        fetch: Callable[[str], Page | str],
        search: Callable[[str, int], Sequence[Hit]] | None = None,
    ) -> None:
        self._fetch = fetch
        self._search = search

    def search(self, query: str, count: int) -> Results:
        if self._search is None:
            raise PageError("there is no search here: open a page by its URL")
        try:
            return Results(list(self._search(query, count))[:count])
        except Exception as error:  # the user's own code: whatever goes wrong there is news for the model
            raise PageError(f"the search for {quoted.repr(query)} failed: {error}") from error

    def fetch(self, url: str) -> Page:
        content = self._get(url)
        if isinstance(content, Page):
            return content
        return (html_page if _looks_like_html(content) else markdown_page)(url, content)

    def source(self, url: str) -> str:
        content = self._get(url)
        return content.text if isinstance(content, Page) else content

    def _get(self, url: str) -> Page | str:
        try:
            return self._fetch(url)
        except Exception as error:  # as above
            raise PageError(f"{quoted.repr(url)} cannot be fetched: {error}") from error


def _looks_like_html(text: str) -> bool:
    return (
        re.search(r"<(?:!doctype html|html|head|body|div|p|a|h[1-6])\b", text[:2000], re.IGNORECASE)
        is not None
    )


def _is_html(name: str) -> bool:
    return name.lower().endswith((".html", ".htm"))


def _url(name: str) -> str:
    """A name as a URL: the name itself unless something in it must not be shown."""
    return quote(os.fsencode(name)) if _ODD.search(name) else name


def _files(count: int) -> str:
    return f"{count:,} file{'' if count == 1 else 's'}"


def _ranked(found: list[tuple[str, Counter[str], int]], pages: int, size: int) -> list[str]:
    """The names by BM25 score, best first, of (name, count of each word, length) among `pages` pages."""
    average = size / max(1, pages) or 1.0
    holding = Counter(word for _, counts, _ in found for word in counts)
    rarity = {word: math.log(1 + (pages - n + 0.5) / (n + 0.5)) for word, n in holding.items()}

    def score(counts: Counter[str], length: int) -> float:
        scale = 1.2 * (0.25 + 0.75 * length / average)
        return sum(rarity[word] * n * 2.2 / (n + scale) for word, n in counts.items())

    return [name for _, name in sorted((-score(counts, length), name) for name, counts, length in found)]


def _summary(text: str, pattern: re.Pattern[str], length: int = 200) -> str:
    """The first line of a page that holds most of the words sought, shortened."""
    lines = [
        " ".join(line.split())
        for line in LINK.sub(r"\1", text).splitlines()
        if line.strip() and not line.startswith("#")
    ]
    best = max(lines, key=lambda line: len({*pattern.findall(line.lower())}), default="")
    return best if len(best) <= length else best[:length].rsplit(" ", 1)[0] + " …"
