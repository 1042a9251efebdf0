"""Where the browser's pages come from: a local folder, or the user's own functions."""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.markup import LINK, html_page, markdown_page
from mlx_gptoss.tools.markup import Page as Page

SUFFIXES = (".md", ".markdown", ".txt", ".html", ".htm", ".rst")
MAX_FILES = 20_000
MAX_BYTES = 4 << 20  # of one page
_WORD = re.compile(r"\w+")


class PageError(Exception):
    """A page cannot be had; the message is for the model."""


@dataclass(frozen=True)
class Hit:
    """One result of a search."""

    url: str
    title: str
    summary: str = ""


class Pages(Protocol):
    """Where pages come from."""

    def search(self, query: str, count: int) -> Sequence[Hit]:
        """The best pages for a query, best first. Raises PageError."""
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

    def search(self, query: str, count: int) -> list[Hit]:
        """Ranked by BM25 (Robertson and Walker 1994: k1 = 1.2, b = 0.75) over text and, thrice, the title."""
        wanted = set(_words(query))
        if not wanted:
            raise PageError("the query has no words")
        documents = []
        for url in self._urls():
            page = self.fetch(url)
            words = Counter(_words(page.text) + 3 * _words(f"{page.title} {url}"))
            documents.append((page, words, sum(words.values())))
        average = sum(length for *_, length in documents) / max(1, len(documents)) or 1.0
        rarity = {}
        for word in wanted:
            holding = sum(word in words for _, words, _ in documents)
            rarity[word] = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        scored = []
        for page, words, length in documents:
            scale = 1.2 * (0.25 + 0.75 * length / average)
            score = sum(rarity[w] * words[w] * 2.2 / (words[w] + scale) for w in wanted)
            if score > 0:
                scored.append((-score, page.url, page))
        return [
            Hit(p.url, p.title, _summary(p.text, wanted)) for _, _, p in sorted(scored, key=lambda s: s[:2])
        ][:count]

    def fetch(self, url: str) -> Page:
        path, name = self._locate(url)
        text = self._read(path, url)
        if path.suffix.lower() in (".html", ".htm"):
            return html_page(name, text)
        return markdown_page(name, text)

    def source(self, url: str) -> str:
        path, _ = self._locate(url)
        return self._read(path, url)

    def _urls(self) -> Iterator[str]:
        found = 0
        for root, folders, files in os.walk(self._folder):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(files):
                path = Path(root, name)
                if name.startswith(".") or path.suffix.lower() not in SUFFIXES or not self._inside(path):
                    continue
                found += 1
                if found > MAX_FILES:
                    raise PageError(f"there are more than {MAX_FILES} pages: open one by its path")
                if path.stat().st_size <= MAX_BYTES:
                    yield path.relative_to(self._folder).as_posix()

    def _locate(self, url: str) -> tuple[Path, str]:
        """The file a URL means, and the URL without detours."""
        name = posixpath.normpath(unquote(url.removeprefix("file://").split("#")[0]).lstrip("/"))
        path = self._folder / name
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if "\0" in name or hidden or not self._inside(path) or not path.is_file():
            raise PageError(f"there is no page {url!r}: search for one, or use a path from the results")
        return path, name

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._folder)

    def _read(self, path: Path, url: str) -> str:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise PageError(f"{url!r} cannot be read ({error.strerror})") from None
        if len(data) > MAX_BYTES:
            raise PageError(f"{url!r} is larger than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8", errors="replace")


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

    def search(self, query: str, count: int) -> list[Hit]:
        if self._search is None:
            raise PageError("there is no search here: open a page by its URL")
        try:
            return list(self._search(query, count))[:count]
        except Exception as error:  # the user's own code: whatever goes wrong there is news for the model
            raise PageError(f"the search for {query!r} failed: {error}") from error

    def fetch(self, url: str) -> Page:
        content = self._get(url)
        if isinstance(content, Page):
            return content
        return html_page(url, content) if _looks_like_html(content) else markdown_page(url, content)

    def source(self, url: str) -> str:
        content = self._get(url)
        return content.text if isinstance(content, Page) else content

    def _get(self, url: str) -> Page | str:
        try:
            return self._fetch(url)
        except Exception as error:  # as above
            raise PageError(f"{url!r} cannot be fetched: {error}") from error


def _looks_like_html(text: str) -> bool:
    return (
        re.search(r"<(?:!doctype html|html|head|body|div|p|a|h[1-6])\b", text[:2000], re.IGNORECASE)
        is not None
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _summary(text: str, wanted: set[str], length: int = 200) -> str:
    """The first line of a page that holds most of the wanted words, shortened."""
    text = LINK.sub(r"\1", text)
    lines = [
        " ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#")
    ]
    best = max(lines, key=lambda line: len(wanted & set(_words(line))), default="")
    return best if len(best) <= length else best[:length].rsplit(" ", 1)[0] + " …"
