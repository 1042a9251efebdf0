"""How deep the references of a schema or a Lark grammar go: each is a step of recursion in the compiler."""

from __future__ import annotations

import re
from typing import Any

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony.schema import resolve

MAX_DEPTH = 128

_NO_PLACE = ("$defs", "definitions", "enum", "const")  # where no schema stands for itself
_RULE = re.compile(r"^[!?]*([A-Za-z_]\w*)[^:\n\"/]*:(?!:)", re.MULTILINE)
_NOT_NAMES = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//.*')
_NAME = re.compile(r"[A-Za-z_]\w*")


def check_schema_references(schema: dict[str, Any], field: str) -> None:
    """Raise SchemaError when more than MAX_DEPTH references follow one another. Linear."""
    seen: set[int] = set()
    stack: list[tuple[Any, int]] = [(schema, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _too_deep("$ref", field)
        if isinstance(node, list):
            stack += [(child, depth) for child in reversed(node)]
        elif isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            stack += [(child, depth) for key, child in node.items() if key not in _NO_PLACE]
            if isinstance(ref := node.get("$ref"), str):
                stack.append((_target(ref, schema), depth + 1))


def check_lark_references(grammar: str, field: str) -> None:
    """The same for the rules of a Lark grammar."""
    rules = list(_RULE.finditer(grammar))
    uses: dict[str, list[str]] = {}
    for rule, after in zip(rules, [*rules[1:], None], strict=True):
        body = grammar[rule.end() : after.start() if after else len(grammar)]
        uses[rule[1]] = _NAME.findall(_NOT_NAMES.sub(" ", body))
    seen: set[str] = set()
    stack = [("start", 0)]
    while stack:
        name, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _too_deep("rules", field)
        if name in uses and name not in seen:
            seen.add(name)
            stack += [(used, depth + 1) for used in reversed(uses[name])]


def _target(ref: str, root: dict[str, Any]) -> Any:
    """What a local reference names; None where it leads nowhere, which the compiler tells better."""
    try:
        return resolve(ref, root)
    except SchemaError:
        return None


def _too_deep(what: str, field: str) -> SchemaError:
    return SchemaError(
        f"{field}: more than {MAX_DEPTH} {what} follow one another: put what they lead to in their place",
        field,
    )
