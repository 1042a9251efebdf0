"""JSON Schema shown as TypeScript, the way the model was taught to read a tool's arguments.

Where openai-harmony 0.0.8 has an answer, the text equals its own, blanks included. It says `any` to `$ref`,
`anyOf`, `allOf`, `const` and enums of anything but strings; here they are shown. A definition that refers to
itself, or that is used more than once and is not short, is declared once by name and never unrolled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.harmony.json_text import lines, to_json
from mlx_gptoss.harmony.schema import check_schema, resolve, worth_a_name

# Keywords that say which shape a value has, as opposed to notes about it and limits on it.
_SHAPE = {
    *("$ref", "type", "enum", "const", "anyOf", "oneOf", "allOf"),
    *("properties", "additionalProperties", "patternProperties", "items", "prefixItems"),
}


def check_parameters(schema: dict[str, Any], where: str) -> None:
    """Raise SchemaError, naming keyword and place, when a tool's schema is invalid or cannot be shown."""
    check_schema(schema, where)
    try:
        TypeWriter().write(schema)
    except RecursionError:
        raise SchemaError(f"{where}: references lead too deep: flatten the schema", "parameters") from None


class TypeWriter:
    """Writes the types of one namespace, keeping the declarations that its tools share."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._declared: dict[str, str] = {}
        self._root: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # of its references that are declared

    def write(self, schema: dict[str, Any]) -> tuple[list[str], str]:
        """(new declarations, the type) of one tool's arguments. `schema` has passed `check_schema`."""
        self._root = schema
        self._names = {ref: _base_name(ref) for ref in worth_a_name(schema)}
        self._settle_names()
        texts = {name: self._declaration(ref, name) for ref, name in self._names.items()}
        new = [text for name, text in texts.items() if name not in self._declared]
        self._declared.update(texts)
        return new, self._names["#"] if "#" in self._names else self._type_of(schema, "")

    def _settle_names(self) -> None:
        """Number the names that something else bears. Tools made from the same models bring equal
        definitions along: those share one declaration.
        """
        bases, count = dict(self._names), 1
        while clashes := self._clashes():
            count += 1
            self._names.update({ref: f"{bases[ref]}_{count}" for ref in clashes})

    def _clashes(self) -> list[str]:
        seen: set[str] = set()
        found = []
        for ref, name in self._names.items():
            other = name in self._declared and self._declared[name] != self._declaration(ref, name)
            if other or name in self._taken or name in seen:
                found.append(ref)
            seen.add(name)
        return found

    def _declaration(self, ref: str, name: str) -> str:
        target = resolve(ref, self._root)
        comment = ""
        if isinstance(target, dict) and isinstance(target.get("description"), str):
            comment = "".join(f"// {line}\n" for line in lines(target["description"]))
            target = {k: v for k, v in target.items() if k != "description"}
        return f"{comment}type {name} = {self._type_of(target, '')};\n"

    def _expand(self, node: Any) -> Any:
        """`node` with a reference that has no name, or a wrapper of one, replaced by what it stands for.
        Notes beside a reference win over those at its target.
        """
        while isinstance(node, dict):
            if "$ref" in node:
                if node["$ref"] in self._names:
                    return node
                keyword, inner = "$ref", resolve(node["$ref"], self._root)
            else:
                keyword = next((k for k in ("allOf", "anyOf") if len(node.get(k, ())) == 1), "")
                if not keyword:
                    return node
                inner = node[keyword][0]
            beside = {k: v for k, v in node.items() if k != keyword}
            if isinstance(inner, bool):
                return beside if inner else False
            if _SHAPE & beside.keys() & inner.keys():
                notes = {k: v for k, v in beside.items() if k not in _SHAPE}
                return {**notes, "allOf": [inner, {k: v for k, v in beside.items() if k in _SHAPE}]}
            node = {**inner, **beside}
        return node

    def _type_of(self, node: Any, indent: str) -> str:
        """The type of `node`, its further lines indented by `indent`."""
        node = self._expand(node)
        if not isinstance(node, dict):
            return "any" if node else "never"
        if "oneOf" in node:
            return "".join(
                f"\n{indent} | {self._variant(v, indent)}{_trailing(self._expand(v))}" for v in node["oneOf"]
            )
        if "$ref" in node:
            return self._names[node["$ref"]]
        if "allOf" in node:
            return self._all_of(node, indent)
        if "anyOf" in node:
            return self._any_of(node, indent)
        if "const" in node:
            return to_json(node["const"])
        kind = _kind(node)
        if "enum" in node and node["enum"] and kind != "string":
            return " | ".join(map(to_json, node["enum"]))
        if isinstance(kind, list) and kind:
            return " | ".join(self._one_of_types(k, node, indent) for k in kind)
        return self._simple(kind, node, indent)

    def _simple(self, kind: object, node: dict[str, Any], indent: str) -> str:
        if kind == "object":
            return self._object(node, indent)
        if kind == "array":
            return self._array(node, indent)
        if kind == "string":
            values = [f'"{v}"' for v in node.get("enum", ()) if isinstance(v, str)]
            return " | ".join(values) or "string"
        if kind in ("number", "integer"):
            return "number"
        return str(kind) if kind in ("boolean", "null") else "any"

    def _one_of_types(self, kind: str, node: dict[str, Any], indent: str) -> str:
        # The library writes the bare names "object" and "array"; there is more to say when they have parts.
        if kind in ("object", "array") and kind not in _structures(node):
            return kind
        return self._simple(kind, {k: v for k, v in node.items() if k != "description"}, indent)

    def _array(self, node: dict[str, Any], indent: str) -> str:
        items = node.get("items")
        first = node.get("prefixItems") or (items if isinstance(items, list) else None)
        if first is not None:
            parts = [self._type_of(item, indent) for item in first]
            rest = items if "prefixItems" in node else node.get("additionalItems")
            if isinstance(rest, dict):
                parts.append(f"...{self._item(rest, indent)}[]")
            return f"[{', '.join(parts)}]"
        return "Array<any>" if items is None else f"{self._item(items, indent)}[]"

    def _item(self, items: Any, indent: str) -> str:
        text = self._type_of(items, indent)
        # The library writes `"a" | "b"[]` for a list of enums, and so do we.
        return f"({text})" if self._is_union(items) and not _plain(items) else text

    def _is_union(self, node: Any) -> bool:
        node = self._expand(node)
        if not isinstance(node, dict) or "$ref" in node:
            return False
        many = len(node.get("anyOf", ())) > 1 or len(node.get("enum", ())) > 1
        return many or "allOf" in node or (isinstance(node.get("type"), list) and len(node["type"]) > 1)

    def _all_of(self, node: dict[str, Any], indent: str) -> str:
        parts = [self._expand(part) for part in node["allOf"]]
        base = {k: v for k, v in node.items() if k != "allOf"}
        parts = [p for p in [*parts, base] if isinstance(p, dict) and _SHAPE & p.keys()]
        merged = _merge_objects(parts)
        if merged is not None:
            notes = {k: v for k, v in base.items() if k == "description"}
            return self._type_of({**merged, **notes}, indent)
        texts = [f"({t})" if self._is_union(p) else t for p in parts if (t := self._type_of(p, indent))]
        return " & ".join(dict.fromkeys(texts)) or "any"

    def _any_of(self, node: dict[str, Any], indent: str) -> str:
        base = {k: v for k, v in node.items() if k != "anyOf"}
        variants = [v for v in map(self._expand, node["anyOf"]) if isinstance(v, dict) and _SHAPE & v.keys()]
        if len(variants) < len(node["anyOf"]):
            # A variant without a shape only adds limits ("one of these is required"), or allows anything.
            return self._type_of(base, indent) if _SHAPE & base.keys() else "any"
        text = " | ".join(dict.fromkeys(self._variant(v, indent) for v in variants))
        return f"{self._type_of(base, indent)} & ({text})" if "properties" in base else text

    def _variant(self, variant: Any, indent: str) -> str:
        return self._nullable(self._type_of(variant, f"{indent}   "), self._expand(variant))

    @staticmethod
    def _nullable(text: str, node: Any) -> str:
        nullable = isinstance(node, dict) and node.get("nullable") is True
        return f"{text} | null" if nullable and "null" not in text else text

    def _object(self, node: dict[str, Any], indent: str) -> str:
        description = node.get("description")
        out = [f"{indent}// {description}\n" if isinstance(description, str) else "", "{\n"]
        required = set(node.get("required", ()))
        for key, value in node.get("properties", {}).items():
            mark = "" if key in required else "?"
            out.append(self._property(f"{indent}{key}{mark}:", self._expand(value), indent))
        for pattern, value in node.get("patternProperties", {}).items():
            out.append(f"{indent}// Keys that match {to_json(pattern)}:\n")
            out.append(self._property(f"{indent}[key: string]:", self._expand(value), indent))
        rest = node.get("additionalProperties")
        if isinstance(rest, dict) and _SHAPE & rest.keys():
            out.append(self._property(f"{indent}[key: string]:", self._expand(rest), indent))
        return "".join([*out, f"{indent}}}"])

    def _property(self, head: str, value: Any, indent: str) -> str:
        if not isinstance(value, dict):
            return f"{head} {self._type_of(value, indent)},\n"
        out = []
        if isinstance(value.get("title"), str):
            out.append(f"{indent}// {value['title']}\n{indent}//\n")
        description = value.get("description")
        if isinstance(description, str) and "oneOf" not in value:
            out.append(f"{indent}// {description}\n")
        examples = value.get("examples")
        if isinstance(examples, list) and examples:
            out.append(f"{indent}// Examples:\n")
            out += [f'{indent}// - "{e}"\n' for e in examples if isinstance(e, str)]
        default = _default(value)
        if "oneOf" in value:
            return "".join([*out, self._one_of_property(head, value, description, default, indent)])
        text = self._nullable(self._type_of(value, f"{indent}    "), value)
        return "".join([*out, f"{head} {text},", f" // {default}" if default else "", "\n"])

    def _one_of_property(
        self, head: str, value: dict[str, Any], description: Any, default: str, indent: str
    ) -> str:
        variants = [self._expand(v) for v in value["oneOf"]]
        first = variants[0].get("description") if isinstance(variants[0], dict) else None
        above = isinstance(description, str) and description != first
        out = [f"{indent}// {description}\n" if above else "", f"{indent}// {default}\n" if default else ""]
        out.append(f"{head}\n")
        for index, variant in enumerate(variants):
            shown = isinstance(variant, dict) and variant.get("description") != description
            note = _trailing(variant, described=shown and not (index == 0 and above), exact=False)
            out.append(f"{indent} | {self._variant(variant, indent)}{note}\n")
        return "".join([*out, f"{indent},\n"])


def _base_name(ref: str) -> str:
    name = "Arguments" if ref == "#" else re.sub(r"\W", "_", unquote(ref).rsplit("/", 1)[-1])
    return f"_{name}" if name[:1].isdigit() or not name else name


def _structures(node: dict[str, Any]) -> set[str]:
    """Which of "object" and "array" the schema describes the inside of."""
    found = set()
    extra = isinstance(node.get("additionalProperties"), dict)
    if extra or {"properties", "patternProperties"} & node.keys():
        found.add("object")
    if {"items", "prefixItems"} & node.keys():
        found.add("array")
    return found


def _kind(node: dict[str, Any]) -> Any:
    """The type, or what the other keywords imply where it is left out."""
    structures = _structures(node)
    implied = next((k for k in ("object", "array") if k in structures), None)
    return node.get("type", implied)


def _plain(node: Any) -> bool:
    """True where the library has an answer of its own to this schema of a list's items."""
    if not isinstance(node, dict) or {"$ref", "anyOf", "allOf", "const"} & node.keys():
        return False
    if "enum" in node:
        return node.get("type") == "string"
    return not isinstance(node.get("type"), list) or not _structures(node) & set(node["type"])


def _default(node: dict[str, Any], *, exact: bool = False) -> str:
    """ "default: …"; a string stands in quotes, one of an enum without (`exact`: with)."""
    if "default" not in node:
        return ""
    value = node["default"]
    if not isinstance(value, str):
        return f"default: {to_json(value)}"
    if not node.get("enum"):
        return f'default: "{value}"'
    return f"default: {to_json(value) if exact else value}"


def _trailing(variant: Any, *, described: bool = True, exact: bool = True) -> str:
    """The comment after a variant of oneOf."""
    if not isinstance(variant, dict):
        return ""
    description = variant.get("description") if described else None
    notes = [description] if isinstance(description, str) else []
    if default := _default(variant, exact=exact):
        notes.append(default)
    return f" // {' '.join(notes)}" if notes else ""


def _merge_objects(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One object schema for several, None unless all are plain objects that share no property."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    rest: dict[str, Any] = {}
    for part in parts:
        if {"$ref", "allOf", "anyOf", "oneOf", "enum", "const"} & part.keys() or _kind(part) != "object":
            return None
        own = part.get("properties", {})
        extra = {k: v for k, v in part.items() if k in ("additionalProperties", "patternProperties")}
        if properties.keys() & own.keys() or rest.keys() & extra.keys():
            return None
        properties.update(own)
        required += part.get("required", ())
        rest.update(extra)
    return {"type": "object", "properties": properties, "required": required, **rest} if parts else None
