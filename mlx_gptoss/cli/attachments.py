"""Text files as part of a message: each under its name, the question after them.

So another question about the same files finds them in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_gptoss.errors import RequestError
from mlx_gptoss.files import read_limited

MAX_BYTES = 16 * 2**20  # of a file; more than any context holds


def read_text(path: Path, field: str = "file") -> str:
    """The text of a file. Raises RequestError when it cannot be read, is too large, or is not UTF-8 text."""
    path = path.expanduser()
    try:
        text = read_limited(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; give a text file", field) from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} holds the byte {error.object[error.start]:#04x} at position {error.start}: "
            "expected a text file in UTF-8",
            field,
        ) from None
    if "\0" in text:
        raise RequestError(f"{path} holds a NUL: expected a text file, not a binary one", field)
    return text


def with_files(message: str, files: Sequence[tuple[str, str]]) -> str:
    """The message behind the files, (name, text) each, fenced so that nothing in them ends them early."""
    parts = []
    for name, text in files:
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{name}:\n{fence}\n{text.rstrip()}\n{fence}")
    return "\n\n".join([*parts, *([message] if message else [])])
