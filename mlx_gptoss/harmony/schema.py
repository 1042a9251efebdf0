"""JSON Schema as data: whether a schema is valid and can be shown, where its references lead, and which of
its parts deserve a name.

What the model is shown cannot say everything. Limits on a value (`minimum`, `pattern`, `maxItems`, …) narrow
a type that is still shown truly: they are left to whoever checks the arguments. A keyword that changes which
shape is meant (`not`, `if`, `dependentSchemas`, …) raises SchemaError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import unquote

from mlx_gptoss.errors import SchemaError

if TYPE_CHECKING:
    from pydantic import BaseModel

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
REFUSED = (
    *("not", "if", "then", "else", "$dynamicRef", "$recursiveRef"),
    *("dependentSchemas", "dependentRequired", "dependencies"),
)
MAX_DEPTH = 64

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SINGLE = ("additionalProperties", "unevaluatedProperties", "unevaluatedItems", "additionalItems")


def _are_types(value: Any) -> bool:
    kinds = value if isinstance(value, list) else [value]
    return bool(kinds) and all(kind in TYPES for kind in kinds)


# Keyword -> what its value must be, in code and in words.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_are_types, f"expected one of {', '.join(TYPES)}"),
    "enum": (lambda v: isinstance(v, list), "expected a list of values"),
    "required": (
        lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        "expected a list of names",
    ),
    **dict.fromkeys(_LISTS, (lambda v: isinstance(v, list) and bool(v), "expected a list of schemas")),
    **dict.fromkeys(_MAPS, (lambda v: isinstance(v, dict), "expected an object")),
}


def is_model(schema: object) -> TypeGuard[type[BaseModel]]:
    """True for a pydantic model class. pydantic itself is not imported."""
    return isinstance(schema, type) and hasattr(schema, "model_json_schema")


def check_schema(schema: object, where: str) -> None:
    """Raise SchemaError, naming keyword and place, when `schema` is invalid or cannot be shown."""

    def wrong(what: str) -> SchemaError:
        return SchemaError(f"{where}: the schema is {what}", "parameters")

    if not isinstance(schema, dict):
        raise wrong(f"a {type(schema).__name__}: expected a dict")
    try:
        json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise wrong("nested too deeply: flatten it") from None
    except (TypeError, ValueError) as error:
        raise wrong(f"not JSON ({error}): use JSON values only") from None
    _check(schema, schema, where, "#", 0)


def _check(node: Any, root: dict[str, Any], where: str, path: str, depth: int) -> None:
    def wrong(what: str) -> SchemaError:
        return SchemaError(f"{where}: {path}: {what}", "parameters")

    if isinstance(node, bool):
        return
    if not isinstance(node, dict):
        raise wrong(f"a {type(node).__name__} where a schema belongs: expected an object, true or false")
    if depth > MAX_DEPTH:
        raise wrong(f"nested more than {MAX_DEPTH} levels deep: flatten it, or name parts in $defs")
    for keyword in REFUSED:
        if keyword in node:
            raise wrong(
                f"the keyword {keyword!r} changes what the schema means and cannot be shown to the model: "
                "say it with anyOf, or in a description"
            )
    for keyword, (holds, expected) in _VALUES.items():
        if keyword in node and not holds(node[keyword]):
            raise wrong(f"{keyword}: {expected}, not {node[keyword]!r:.60}")
    if "$ref" in node:
        resolve(node["$ref"], root, where, path)
    for step, child in _children(node):
        _check(child, root, where, f"{path}/{step}", depth + 1)


def _children(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas right inside `node`, each with its path from there."""
    for keyword in _MAPS:
        for key, child in node.get(keyword, {}).items():
            yield f"{keyword}/{key}", child
    for keyword in _LISTS:
        for index, child in enumerate(node.get(keyword, ())):
            yield f"{keyword}/{index}", child
    for keyword in _SINGLE:
        if keyword in node:
            yield keyword, node[keyword]
    items = node.get("items", True)
    for index, child in enumerate(items if isinstance(items, list) else [items]):
        yield f"items/{index}" if isinstance(items, list) else "items", child


def without_refused(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tool's schema without what `check_schema` refuses: keywords that cannot be shown, and those
    whose value has no meaning, such as null or an unknown type. Only schemas nested too deeply stay refused.
    """
    root = _without_refused(schema) or {}
    if isinstance(root.get("type"), list) and "object" in root["type"]:
        root["type"] = "object"  # a call's arguments are never null
    _drop_lost_refs(root, root)
    return root


def _without_refused(node: Any) -> Any:
    if not isinstance(node, dict):
        return node if isinstance(node, bool) else {}
    if node.get("not") == {}:  # how zod writes what must be absent
        return False
    result = {keyword: value for keyword, value in node.items() if _has_meaning(keyword, value)}
    for keyword, value in result.items():
        if keyword in _MAPS:
            result[keyword] = {key: _without_refused(child) for key, child in value.items()}
        elif keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
            children = [_without_refused(child) for child in value]
            possible = [child for child in children if child is not False]
            result[keyword] = possible or children if keyword in ("anyOf", "oneOf") else children
        elif keyword in _SINGLE or keyword == "items":
            result[keyword] = _without_refused(value)
    return result


def _has_meaning(keyword: str, value: Any) -> bool:
    if value is None:
        return keyword in ("const", "default")
    return _VALUES[keyword][0](value) if keyword in _VALUES else keyword not in REFUSED


def _drop_lost_refs(node: Any, root: dict[str, Any]) -> None:
    if not isinstance(node, dict):
        return
    if "$ref" in node:
        try:
            resolve(node["$ref"], root)
        except SchemaError:
            del node["$ref"]
    for _, child in _children(node):
        _drop_lost_refs(child, root)


def resolve(ref: object, root: dict[str, Any], where: str = "schema", path: str = "#") -> Any:
    """The schema that a local reference such as "#/$defs/Node" names. Raises SchemaError."""
    found: Any = root
    if isinstance(ref, str) and ref.startswith("#"):
        for part in ref[1:].split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            else:
                found = None
        if isinstance(found, dict | bool) and (ref == "#" or ref.startswith("#/")):
            return found
    raise SchemaError(
        f"{where}: {path}: $ref {ref!r} leads nowhere: expected a place inside this schema, such as "
        "'#/$defs/Name'",
        "parameters",
    )


def worth_a_name(root: dict[str, Any]) -> list[str]:
    """The references to declare: those on a cycle, and those used again that are not short. In order."""
    uses: dict[str, int] = {}
    inside: dict[str, set[str]] = {}
    for ref in _refs(root):
        uses[ref] = uses.get(ref, 0) + 1
    for ref in uses:
        target = resolve(ref, root)
        # The root holds the definitions, but refers only to what its own shape does.
        if ref == "#":
            target = {k: v for k, v in target.items() if k not in ("$defs", "definitions")}
        inside[ref] = set(_refs(target))
    cyclic = _cyclic(inside)
    return [ref for ref in uses if ref in cyclic or (uses[ref] > 1 and _long(resolve(ref, root)))]


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for _, child in _children(node):
            yield from _refs(child)


def _cyclic(inside: Mapping[str, set[str]]) -> set[str]:
    """The references on a cycle, or on a way from one cycle to another. Linear in their number."""
    behind: dict[str, set[str]] = {ref: set() for ref in inside}
    for ref, targets in inside.items():
        for target in targets:
            behind[target].add(ref)
    left = set(inside)
    for ahead, back in ((inside, behind), (behind, inside)):
        count = {ref: len(ahead[ref] & left) for ref in left}
        ends = [ref for ref in left if count[ref] == 0]
        while ends:
            ref = ends.pop()
            left.discard(ref)
            for other in back[ref] & left:
                count[other] -= 1
                if count[other] == 0:
                    ends.append(other)
    return left


def _long(node: Any) -> bool:
    return isinstance(node, dict) and bool(
        {"properties", "$ref", "anyOf", "oneOf", "allOf", "items"} & node.keys()
    )
