"""Tools from Python functions: the schema of a signature, its descriptions, and arguments back from JSON."""

from __future__ import annotations

import datetime
import enum
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict, Union

import pytest
from pydantic import BaseModel, Field

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.arguments import bind_arguments
from mlx_gptoss.tools.functions import tool_from_function


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


@dataclass
class Node:
    """A node of a tree."""

    value: int
    children: list[Node] = field(default_factory=list)
    label: str = "x"


class Options(TypedDict):
    """Some options.

    Args:
        limit: The most to return.
    """

    limit: int
    order: NotRequired[Literal["up", "down"]]


class Place(BaseModel):
    name: str = Field(description="Its name.", min_length=1)
    within: Place | None = None


def properties(function: Any) -> dict[str, Any]:
    parameters = tool_from_function(function).parameters
    assert parameters is not None
    return parameters["properties"]


def test_name_and_description_come_from_the_function() -> None:
    def get_time() -> str:
        """The time now.

        In UTC.
        """
        return ""

    tool = tool_from_function(get_time)
    assert (tool.name, tool.description, tool.parameters) == ("get_time", "The time now.\n\nIn UTC.", None)


def test_type_hints_become_a_schema() -> None:
    def f(
        a: str,
        b: int,
        c: float,
        d: bool,
        e: list[int],
        f: dict[str, float],
        g: Optional[int],  # noqa: UP045
        h: Union[str, int],  # noqa: UP007
        i: Literal["x", "y"],
        j: Unit,
        k: tuple[int, str],
        m: set[str],
        n: Any,
        o: datetime.date,
        p: list[Node] | None,
        q: dict,
        r: list,
        s: uuid.UUID,
        untyped,
    ) -> None: ...

    assert properties(f) == {
        "a": {"type": "string"},
        "b": {"type": "integer"},
        "c": {"type": "number"},
        "d": {"type": "boolean"},
        "e": {"type": "array", "items": {"type": "integer"}},
        "f": {"type": "object", "additionalProperties": {"type": "number"}},
        "g": {"type": ["integer", "null"]},
        "h": {"type": ["string", "integer"]},
        "i": {"type": "string", "enum": ["x", "y"]},
        "j": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "k": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "minItems": 2,
            "maxItems": 2,
        },
        "m": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "n": {},
        "o": {"type": "string", "format": "date"},
        "p": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Node"}}, {"type": "null"}]},
        "q": {"type": "object"},
        "r": {"type": "array"},
        "s": {"type": "string", "format": "uuid"},
        "untyped": {},
    }


NO_JSON = object()


def test_defaults_make_arguments_optional() -> None:
    def f(
        a: str, b: int = 3, c: Unit = Unit.F, d: str | None = None, e: Any = NO_JSON, *, g: bool
    ) -> None: ...

    parameters = tool_from_function(f).parameters
    assert parameters is not None
    assert parameters["required"] == ["a", "g"]
    assert [p.get("default") for p in parameters["properties"].values()] == [
        None,
        3,
        "fahrenheit",
        None,
        None,
        None,
    ]
    assert "default" not in parameters["properties"]["d"]


def test_dataclasses_typed_dicts_and_models_become_definitions() -> None:
    def f(node: Node, options: Options, place: Place) -> None: ...

    parameters = tool_from_function(f).parameters
    assert parameters is not None
    definitions = parameters["$defs"]
    assert definitions["Node"] == {
        "type": "object",
        "properties": {
            "value": {"type": "integer"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
            "label": {"type": "string", "default": "x"},
        },
        "required": ["value"],
        "description": "A node of a tree.",
    }
    assert definitions["Options"]["required"] == ["limit"]
    assert definitions["Options"]["properties"]["limit"]["description"] == "The most to return."
    assert definitions["Place"]["properties"]["name"]["description"] == "Its name."
    assert definitions["Place"]["properties"]["within"]["anyOf"][0] == {"$ref": "#/$defs/Place"}


def google(city: str, days: int = 1, unit: str = "c") -> None:
    """Gets the weather.

    Works anywhere.

    Args:
        city: The city: e.g.
            San Francisco.
        days (int, optional): How many.

    Returns:
        The weather.

    Raises:
        ValueError: never.
    """


def numpy_style(city: str, days: int = 1, unit: str = "c") -> None:
    """Gets the weather.

    Works anywhere.

    Parameters
    ----------
    city : str
        The city: e.g.
        San Francisco.
    days : int, optional
        How many.

    Returns
    -------
    str
        The weather.
    """


def rest(city: str, days: int = 1, unit: str = "c") -> None:
    """Gets the weather.

    Works anywhere.

    :param city: The city: e.g.
        San Francisco.
    :type city: str
    :param int days: How many.
    :returns: The weather.
    """


@pytest.mark.parametrize("function", [google, numpy_style, rest])
def test_argument_descriptions_come_from_the_docstring(function: Any) -> None:
    tool = tool_from_function(function)
    assert tool.description == "Gets the weather.\n\nWorks anywhere."
    said = {name: schema.get("description") for name, schema in properties(function).items()}
    assert said == {"city": "The city: e.g. San Francisco.", "days": "How many.", "unit": None}


def test_annotated_text_and_fields_describe_an_argument() -> None:
    def f(a: Annotated[int, "how\nmany"], b: Annotated[str, Field(description="which")]) -> None: ...

    assert [p["description"] for p in properties(f).values()] == ["how many", "which"]


def test_a_bound_method_is_a_tool_without_self() -> None:
    class Shop:
        def price(self, item: str) -> int:
            return 1

    assert list(properties(Shop().price)) == ["item"]


async def coroutine(a: int) -> None: ...


def star(*args: int) -> None: ...


def keywords(**kwargs: int) -> None: ...


def positional(a: int, /) -> None: ...


def unknown_hint(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def no_json_form(a: bytes) -> None: ...


def keyed_by_number(a: dict[int, str]) -> None: ...


@pytest.mark.parametrize(
    "function",
    [coroutine, star, keywords, positional, unknown_hint, no_json_form, keyed_by_number, lambda a: a, 5],
)
def test_what_a_model_cannot_call_is_refused(function: Any) -> None:
    with pytest.raises(ToolError) as caught:
        tool_from_function(function)
    assert "\n" not in str(caught.value) and ": " in str(caught.value)


def everything(
    count: int = 0,
    share: float = 0.0,
    unit: Unit = Unit.C,
    node: Node | None = None,
    place: Place | None = None,
    options: Options | None = None,
    on: datetime.date | None = None,
    pair: tuple[int, str] = (0, ""),
    names: set[str] = frozenset(),  # type: ignore[assignment]
    by_name: dict[str, Unit] = {},  # noqa: B006
    kind: Literal[1, "1", None] = None,
    key: uuid.UUID | None = None,
) -> None: ...


def test_arguments_become_the_values_the_hints_promise() -> None:
    key = uuid.uuid4()
    bound = bind_arguments(
        everything,
        {
            "count": 2.0,
            "share": 1,
            "unit": "fahrenheit",
            "node": {"value": 1, "children": [{"value": 2}]},
            "place": {"name": "A", "within": {"name": "B"}},
            "options": {"limit": 3, "order": "up"},
            "on": "2026-02-03",
            "pair": [1, "a"],
            "names": ["a", "b"],
            "by_name": {"x": "celsius"},
            "kind": "1",
            "key": str(key),
        },
    )
    assert bound == {
        "count": 2,
        "share": 1.0,
        "unit": Unit.F,
        "node": Node(1, [Node(2)]),
        "place": Place(name="A", within=Place(name="B")),
        "options": {"limit": 3, "order": "up"},
        "on": datetime.date(2026, 2, 3),
        "pair": (1, "a"),
        "names": {"a", "b"},
        "by_name": {"x": Unit.C},
        "kind": "1",
        "key": key,
    }
    assert type(bound["count"]) is int and type(bound["share"]) is float


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"count": "2"}, 'count is "2": expected a whole number'),
        ({"count": True}, "count is true"),
        ({"count": 1.5}, "count is 1.5"),
        ({"unit": "kelvin"}, '"celsius", "fahrenheit"'),
        ({"node": {"value": "a"}}, 'node.value is "a"'),
        ({"node": {}}, "value"),
        ({"node": {"value": 1, "colour": 2}}, "colour"),
        ({"place": {"name": ""}}, "place.name"),
        ({"options": {}}, "limit"),
        ({"on": "soon"}, "ISO"),
        ({"pair": [1]}, "pair has 1 items"),
        ({"names": "ab"}, "expected a list"),
        ({"by_name": {"x": 1}}, "by_name.x is 1"),
        ({"kind": True}, "kind is true"),
        ({"nope": 1}, "unknown nope"),
    ],
)
def test_wrong_arguments_are_told_in_words_for_the_model(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolError) as caught:
        bind_arguments(everything, arguments)
    assert said in str(caught.value)


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ToolError, match="missing city; unknown town; expected city, days, unit"):
        bind_arguments(google, {"town": "x"})
