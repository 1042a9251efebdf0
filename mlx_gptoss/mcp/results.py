"""What comes back from a server, as text for the model: results, and what went wrong in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp.types import CallToolResult

MAX_RESULT = 20_000  # characters of a result that the model gets to see
MAX_LINE = 300  # characters of an error


def result_text(result: CallToolResult) -> str:
    """The text of a result, of a long one its beginning and end. What failed begins with "error: "."""
    text = "\n".join(map(_part, result.content))
    if not text and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    if (beyond := len(text) - MAX_RESULT) > 0:
        half = MAX_RESULT // 2
        text = f"{text[:half]}\n[… {beyond:,} characters left out …]\n{text[-half:]}"
    return f"error: {text}" if result.is_error else text


def _part(part: Any) -> str:
    match part.type:
        case "text":
            return str(part.text)
        case "resource" if getattr(part.resource, "text", None) is not None:
            return str(part.resource.text)
        case "resource":
            return f"[left out: a resource of type {part.resource.mime_type}, {part.resource.uri}]"
        case "resource_link":
            return f"[{part.name}]({part.uri})"
    return f"[left out: {part.type} of type {part.mime_type}; only text can be read]"


def one_line(error: BaseException | str) -> str:
    """What went wrong. Of an exception that groups others, the first that says something."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:MAX_LINE])
