"""The content of OpenAI's messages and items: text, or parts of it."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_gptoss.errors import RequestError
from mlx_gptoss.server.translate.request import RequestModel


class ContentPart(RequestModel):
    type: str
    text: str | None = None
    refusal: str | None = None


def text_of(content: str | Sequence[ContentPart] | None, field: str) -> str:
    """The text of a message's content; images, audio and files are refused by name."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal"):
            raise RequestError(
                f"{field}[{index}] is of type {part.type[:40]!r}: gpt-oss reads text only",
                f"{field}[{index}].type",
            )
        if text is None:
            raise RequestError(f"{field}[{index}] has no text", f"{field}[{index}].text")
        texts.append(text)
    return "\n".join(texts)
