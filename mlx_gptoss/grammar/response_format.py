"""The form of an answer: a JSON schema, any JSON object, a regex, a Lark grammar, or a choice of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher

from mlx_gptoss.errors import RequestError, SchemaError
from mlx_gptoss.grammar.references import check_lark_references, check_schema_references
from mlx_gptoss.grammar.schema import Schema, json_schema_of, parse_reply, schema_error, schema_grammar

Kind = Literal["schema", "regex", "lark", "choices", "json_object"]


@dataclass(frozen=True)
class ResponseFormat:
    """One of the five ways to say it. `value` is what the caller gave for it."""

    kind: Kind
    value: Any

    @classmethod
    def of(
        cls,
        *,
        schema: Schema | None = None,
        regex: str | None = None,
        lark: str | None = None,
        choices: Sequence[str] | None = None,
        json_object: bool = False,
    ) -> ResponseFormat | None:
        """The one that was given, or None. Raises RequestError for more than one."""
        ways: dict[Kind, Any] = {
            "schema": schema,
            "regex": regex,
            "lark": lark,
            "choices": choices,
            "json_object": json_object or None,
        }
        given = [cls(kind, value) for kind, value in ways.items() if value is not None]
        if len(given) > 1:
            names = " and ".join(way.kind for way in given)
            raise RequestError(f"{names} were given together: a reply has one shape, give one", given[1].kind)
        return given[0] if given else None

    @property
    def is_json(self) -> bool:
        return self.kind in ("schema", "json_object")

    def grammar(self) -> str:
        """The llguidance grammar. Raises SchemaError, naming the keyword at fault."""
        if self.is_json:
            check_schema_references(shape := self.shape, self.kind)
            try:
                return schema_grammar(shape)
            except ValueError as error:
                raise self.error(error) from None
        if self.kind == "choices":
            choices = self.value
            if isinstance(choices, str) or not choices or not all(isinstance(c, str) and c for c in choices):
                raise SchemaError(
                    f"choices is {choices!r:.80}: expected a list of non-empty texts", "choices"
                )
            forms = " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)
            return LLMatcher.grammar_from_lark(f"start: {forms}")
        if not isinstance(self.value, str) or not self.value:
            raise SchemaError(f"{self.kind} is {self.value!r:.80}: expected a non-empty text", self.kind)
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.value)
        check_lark_references(self.value, "lark")
        return LLMatcher.grammar_from_lark(self.value)

    @property
    def shape(self) -> Any:
        """The JSON schema of the two JSON forms, what was given of the others."""
        if self.kind == "schema":
            return json_schema_of(self.value)
        return {"type": "object"} if self.kind == "json_object" else self.value

    def error(self, cause: ValueError) -> SchemaError:
        """What the grammar's compiler says against it."""
        return schema_error(str(cause), self.shape, self.kind)

    def parse(self, text: str) -> Any:
        """A whole answer as data (see parse_reply); None for the forms that are only text."""
        return parse_reply(text, self.value if self.kind == "schema" else None) if self.is_json else None
