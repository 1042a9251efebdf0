"""Constraints from a request's keywords, as the public API spells them."""

from __future__ import annotations

from typing import Any

from mlx_gptoss.grammar import ResponseFormat, TurnConstraint, compile_constraint
from mlx_gptoss.tokenizer import Tokenizer

FORMATS = ("schema", "regex", "lark", "choices", "json_object")


def constrain(tokenizer: Tokenizer, **request: Any) -> TurnConstraint | None:
    """What compile_constraint makes of tools and choices, with the answer's form as a keyword of its own."""
    response_format = ResponseFormat.of(**{k: request.pop(k) for k in FORMATS if k in request})
    return compile_constraint(tokenizer, response_format=response_format, **request)
