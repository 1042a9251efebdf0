"""Text in which the chat format's special tokens are spelled out, to tokens."""

from __future__ import annotations

import re

from mlx_gptoss.tokenizer import SPECIAL_TOKENS, Tokenizer

_MARKUP = re.compile(f"({'|'.join(map(re.escape, SPECIAL_TOKENS.values()))})")
_FIELDS = {text: field for field, text in SPECIAL_TOKENS.items()}


def encode_markup(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text; special tokens that it spells are themselves."""
    tokens: list[int] = []
    for part in _MARKUP.split(text):
        if part in _FIELDS:
            tokens.append(getattr(tokenizer.special, _FIELDS[part]))
        else:
            tokens += tokenizer.encode(part)
    return tokens
