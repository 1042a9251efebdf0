"""Descriptions out of docstrings: what a function does, and what each argument means.

Reads the three common styles: Google ("Args:" and an indented list), numpy ("Parameters" underlined) and
reST (":param name: …"). A docstring in none of them is all description.
"""

from __future__ import annotations

import inspect
import re

_GOOGLE = re.compile(r"(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments):\s*$")
_GOOGLE_OTHER = re.compile(
    r"(Returns?|Yields?|Raises|Examples?|Notes?|Attributes|References|See Also|Todo|Warnings?|Warns):\s*$"
)
_GOOGLE_ITEM = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ITEM = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?$")
_REST = re.compile(r":(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)")
_REST_OTHER = re.compile(r":(?:type|returns?|rtype|raises?|except|exception|var|ivar|yields?)\b[^:]*:.*")


def read_docstring(text: str | None) -> tuple[str, dict[str, str]]:
    """(description of the function, descriptions of its arguments, each on one line)."""
    if not text:
        return "", {}
    lines = inspect.cleandoc(text).split("\n")
    kept: list[str] = []
    arguments: dict[str, list[str]] = {}
    index = 0
    while index < len(lines):
        line = lines[index]
        underlined = index + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[index + 1].strip())
        if underlined:
            block, index = _section(lines, index + 2)
            if line.strip() in ("Parameters", "Other Parameters"):
                _numpy(block, arguments)
        elif _GOOGLE.fullmatch(line) or _GOOGLE_OTHER.fullmatch(line):
            block, index = _indented(lines, index + 1)
            if _GOOGLE.fullmatch(line):
                _google(block, arguments)
        elif found := _REST.match(line):
            block, index = _indented(lines, index + 1)
            arguments[found[1]] = [found[2], *block]
        elif _REST_OTHER.match(line):
            _, index = _indented(lines, index + 1)
        else:
            kept.append(line)
            index += 1
    described = {name: " ".join(" ".join(parts).split()) for name, parts in arguments.items()}
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip(), described


def _indented(lines: list[str], start: int) -> tuple[list[str], int]:
    """The lines from `start` on that are indented or blank, and where they end."""
    end = start
    while end < len(lines) and (not lines[end].strip() or lines[end][:1].isspace()):
        end += 1
    return lines[start:end], end


def _section(lines: list[str], start: int) -> tuple[list[str], int]:
    """The lines from `start` up to the next underlined heading."""
    end = start
    while end < len(lines) and not (
        end + 1 < len(lines) and lines[end].strip() and re.fullmatch(r"-{3,}", lines[end + 1].strip())
    ):
        end += 1
    return lines[start:end], end


def _google(block: list[str], arguments: dict[str, list[str]]) -> None:
    margin = min((len(line) - len(line.lstrip()) for line in block if line.strip()), default=0)
    current: list[str] | None = None
    for line in block:
        found = _GOOGLE_ITEM.match(line[margin:]) if line.strip() else None
        if found is not None:
            current = arguments.setdefault(found[1], [])
            current.append(found[2])
        elif current is not None:
            current.append(line)


def _numpy(block: list[str], arguments: dict[str, list[str]]) -> None:
    current: list[list[str]] = []
    for line in block:
        found = _NUMPY_ITEM.match(line) if line.strip() and not line[:1].isspace() else None
        if found is not None:
            current = [arguments.setdefault(name.strip(), []) for name in found[1].split(",")]
        else:
            for parts in current:
                parts.append(line)
