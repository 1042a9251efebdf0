"""Descriptions out of docstrings: what a function does, and what each argument means.

Reads the three common styles: Google ("Args:" and an indented list), numpy ("Parameters" underlined) and
reST (":param name: …"). A docstring in none of them is all description.
"""

from __future__ import annotations

import inspect
import re

# Each takes a whole section, and the name of what it describes where that is an argument.
_INDENTED = r"((?:[ \t].*\n|\n)*)"
_UNDERLINE = r"[ \t]*-{3,}[ \t]*"
_NUMPY = re.compile(rf"^(.*)\n{_UNDERLINE}\n((?:(?!.*\S.*\n{_UNDERLINE}$).*\n)*)", re.M)
_GOOGLE = re.compile(
    r"^(?:(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments)|Returns?|Yields?|Raises|Examples?"
    rf"|Notes?|Attributes|References|See Also|Todo|Warnings?|Warns):[ \t]*\n{_INDENTED}",
    re.M,
)
_REST = re.compile(
    r"^:(?:(?:param|parameter|arg|argument|key|keyword)[ \t]+(?:[^:\n]*[ \t])?\*{0,2}(\w+)[ \t]*"
    rf"|(?:type|returns?|rtype|raises?|except|exception|var|ivar|yields?)\b[^:\n]*):(.*\n){_INDENTED}",
    re.M,
)
_NUMPY_ITEM = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?()$")
_GOOGLE_ITEM = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def read_docstring(text: str | None) -> tuple[str, dict[str, str]]:
    """(description of the function, descriptions of its arguments, each on one line)."""
    arguments: dict[str, list[str]] = {}

    def numpy(found: re.Match[str]) -> str:
        if found[1].strip() in ("Parameters", "Other Parameters"):
            _items(found[2], _NUMPY_ITEM, arguments)
        return ""

    def google(found: re.Match[str]) -> str:
        if found[1]:
            _items(found[2], _GOOGLE_ITEM, arguments)
        return ""

    def rest(found: re.Match[str]) -> str:
        if found[1]:
            arguments[found[1]] = [found[2], found[3]]
        return ""

    text = _NUMPY.sub(numpy, inspect.cleandoc(text or "") + "\n")
    text = _REST.sub(rest, _GOOGLE.sub(google, text))
    described = {name: " ".join(" ".join(parts).split()) for name, parts in arguments.items()}
    return re.sub(r"\n{3,}", "\n\n", text).strip(), described


def _items(block: str, pattern: re.Pattern[str], arguments: dict[str, list[str]]) -> None:
    """Items at the block's margin: names, what is said beside them, and the indented lines below."""
    lines = block.split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    current: list[list[str]] = []
    for line in lines:
        if found := pattern.match(line[margin:]):
            current = [arguments.setdefault(name.strip(), []) for name in found[1].split(",")]
            line = found[2]
        for parts in current:
            parts.append(line)
