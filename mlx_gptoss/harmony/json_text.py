"""JSON and lines of text, printed to the character as the library prints them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any


def lines(text: str) -> list[str]:
    r"""Lines as the library splits them: at \n or \r\n, no empty one after the last break."""
    parts = text.split("\n")
    last = parts.pop()
    return [p.removesuffix("\r") for p in parts] + ([last] if last else [])


def to_json(value: Any) -> str:
    """Compact JSON with numbers as the library prints them: 1e16, 0.00001, 10.0."""
    if isinstance(value, dict):
        inner = ",".join(f"{json.dumps(str(k), ensure_ascii=False)}:{to_json(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_json, value))}]"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        try:
            value = float(value)
        except OverflowError:
            return str(value)
    return _number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """The shortest digits that give `value` back, in the notation of Rust's JSON: plain from 1e-5 to 1e16."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text = "".join(map(str, digits))
    point = len(text) + int(exponent)
    minus = "-" if sign else ""
    if value == 0:
        return f"{minus}0.0"
    if len(text) <= point <= 16:
        return f"{minus}{text}{'0' * (point - len(text))}.0"
    if 0 < point <= 16:
        return f"{minus}{text[:point]}.{text[point:]}"
    if -5 < point <= 0:
        return f"{minus}0.{'0' * -point}{text}"
    fraction = f".{text[1:]}" if len(text) > 1 else ""
    return f"{minus}{text[0]}{fraction}e{point - 1}"
