"""Tools from Python functions: the schema of a signature, its descriptions, and arguments back from JSON."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import pathlib
import uuid
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, Required, TypedDict, Union

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from mlx_gptoss.errors import ToolError
from mlx_gptoss.tools.functions import read_function, tool_from_function


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
    found: dict[str, Any] = parameters["properties"]
    return found


def test_name_and_description_come_from_the_function() -> None:
    def get_time() -> str:
        """The time now.

        In UTC.
        """
        return ""

    tool = tool_from_function(get_time)
    assert (tool.name, tool.description, tool.parameters) == ("get_time", "The time now.\n\nIn UTC.", None)


def test_type_hints_become_a_schema() -> None:
    def f(  # type: ignore[no-untyped-def]
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
        q: dict,  # type: ignore[type-arg]
        r: list,  # type: ignore[type-arg]
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


def test_without_required_arguments_none_are_listed() -> None:
    def f(a: int = 1) -> None: ...

    assert tool_from_function(f).parameters == {
        "type": "object",
        "properties": {"a": {"type": "integer", "default": 1}},
    }


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

    Other Parameters
    ----------------
    days, hours : int, optional
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


async def pieces(a: int) -> AsyncIterator[int]:
    yield a


def star(*args: int) -> None: ...


def keywords(**kwargs: int) -> None: ...


def positional(a: int, /) -> None: ...


def unknown_hint(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@dataclass
class Unreadable:
    a: Nowhere  # type: ignore[name-defined]  # noqa: F821


def unknown_hint_inside(a: Unreadable) -> None: ...


def no_json_form(a: bytes) -> None: ...


def keyed_by_number(a: dict[int, str]) -> None: ...


@pytest.mark.parametrize(
    "function",
    [pieces, star, keywords, positional, unknown_hint, unknown_hint_inside, no_json_form, keyed_by_number]
    + [lambda a: a, 5, max],
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


def bind(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return read_function(function)[1](json.dumps(arguments))


def test_arguments_become_the_values_the_hints_promise() -> None:
    key = uuid.uuid4()
    bound = bind(
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
        ({"count": "2"}, 'count is "2": expected a valid integer'),
        ({"count": True}, "count is true"),
        ({"count": 1.5}, "count is 1.5"),
        ({"unit": "kelvin"}, '"celsius", "fahrenheit"'),
        ({"node": {"value": "a"}}, 'node.value is "a"'),
        ({"node": {}}, "node: missing value; expected value, children, label"),
        (
            {"node": {"value": 1, "children": [{"value": 1, "colour": 2}]}},
            "node.children[0]: unknown colour; expected value, children, label",
        ),
        ({"place": {"name": ""}}, "place.name"),
        ({"options": {}}, "options: missing limit; expected limit, order"),
        ({"on": "soon"}, 'on is "soon": expected a date in ISO form'),
        ({"pair": [1]}, "pair[1]: missing"),
        ({"pair": [1, "a", 2]}, 'pair is [1, "a", 2]: Tuple should have at most 2 items'),
        ({"names": "ab"}, 'names is "ab": expected a valid array'),
        ({"by_name": {"x": 1}}, "by_name.x is 1"),
        ({"kind": True}, "kind is true"),
        ({"nope": 1}, "unknown nope"),
    ],
)
def test_wrong_arguments_are_told_in_words_for_the_model(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ToolError) as caught:
        bind(everything, arguments)
    assert said in str(caught.value)


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ToolError, match="missing city; unknown town; expected city, days, unit"):
        bind(google, {"town": "x"})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"city": "\\ud800"}', "{'city': 1}"])
def test_arguments_that_are_no_json_object_are_told_so(text: str) -> None:
    with pytest.raises(ToolError, match=r"^the arguments are .*(JSON|expected an object)"):
        read_function(google)[1](text)


def test_a_long_wrong_value_is_cut_in_the_error() -> None:
    with pytest.raises(ToolError) as caught:
        bind(everything, {"count": "x" * 10_000})
    assert len(str(caught.value)) < 300


Grams = NewType("Grams", int)


class Size(enum.IntEnum):
    S = 1
    L = 2


@dataclass(frozen=True, slots=True)
class Span:
    start: datetime.date
    end: datetime.date
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError("end lies before start")
        if self.end == datetime.date.max:
            raise TypeError("there is no day after end")
        object.__setattr__(self, "length", (self.end - self.start).days)


class Visit(TypedDict, total=False):
    span: Required[Span]
    times: list[datetime.time]
    companion: Visit


def json_forms(
    at: datetime.datetime,
    price: decimal.Decimal,
    path: pathlib.Path,
    grams: Grams,
    size: Size,
    mixed: Literal[Unit.C, "none"],
    wider: frozenset[str],
    unique: Set[int],
    some: Iterable[datetime.date],
    more: Sequence[Size],
    rest: Collection[tuple[int, ...]],
    lookup: Mapping[str, decimal.Decimal],
    when: datetime.date | str,
    number: float | int,
    rating: Annotated[int, "one to five", Field(ge=1, le=5)],
    visit: Visit,
    anything: Any,
) -> None: ...


FORMS: dict[str, tuple[Any, Any]] = {
    "at": ("2026-02-03T04:05:06Z", datetime.datetime(2026, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)),
    "price": ("1.10", decimal.Decimal("1.10")),
    "path": ("a/b", pathlib.Path("a/b")),
    "grams": (5, Grams(5)),
    "size": (2, Size.L),
    "mixed": ("celsius", Unit.C),
    "wider": (["a", "a"], frozenset("a")),
    "unique": ([1, 1.0], {1}),
    "some": (["2026-02-03"], [datetime.date(2026, 2, 3)]),
    "more": ([1, 2], [Size.S, Size.L]),
    "rest": ([[1], []], [(1,), ()]),
    "lookup": ({"a": 0.1}, {"a": decimal.Decimal("0.1")}),
    "when": ("2026-02-03", datetime.date(2026, 2, 3)),
    "number": (3, 3.0),
    "rating": (5, 5),
    "visit": (
        {
            "span": {"start": "2026-02-03", "end": "2026-02-05"},
            "companion": {"span": {"start": "2026-02-03", "end": "2026-02-03"}, "times": ["10:30"]},
        },
        {
            "span": Span(datetime.date(2026, 2, 3), datetime.date(2026, 2, 5)),
            "companion": {
                "span": Span(datetime.date(2026, 2, 3), datetime.date(2026, 2, 3)),
                "times": [datetime.time(10, 30)],
            },
        },
    ),
    "anything": ({"a": [1, None, 2.0]}, {"a": [1, None, 2.0]}),
}


def test_every_hint_takes_its_json_form() -> None:
    bound = bind(json_forms, {name: given for name, (given, _) in FORMS.items()})
    assert bound == {name: expected for name, (_, expected) in FORMS.items()}
    assert {name: type(value) for name, value in bound.items()} == {
        name: type(expected) for name, (_, expected) in FORMS.items()
    }
    assert bound["visit"]["span"].length == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("at", 5, "at is 5: expected a datetime in ISO form"),
        ("at", "5", 'at is "5": expected a datetime in ISO form'),
        ("price", "cheap", 'price is "cheap": expected a valid decimal'),
        ("price", True, "price is true"),
        ("path", 1, "path is 1: expected a valid string"),
        ("grams", "5", 'grams is "5": expected a valid integer'),
        ("size", True, "size is true: expected one of 1, 2"),
        ("size", "S", 'size is "S": expected one of 1, 2'),
        ("mixed", "C", '"celsius", "none"'),
        ("wider", "ab", "expected a valid array"),
        ("some", [5], "some[0] is 5: expected a date in ISO form"),
        ("rest", [[1, "b"]], 'rest[0][1] is "b": expected a valid integer'),
        ("lookup", {"a": []}, "lookup.a is []"),
        ("when", 5, "when is 5: expected a date in ISO form or a valid string"),
        ("rating", 6, "rating is 6: expected less than or equal to 5"),
        ("visit", {"span": {"start": "2026-02-03"}}, "visit.span: missing end; expected start, end"),
        ("visit", {"span": {"start": "2026-02-03", "end": "2026-02-01"}}, "end lies before start"),
        ("visit", {"span": {"start": "2026-02-03", "end": "9999-12-31"}}, "there is no day after end"),
        ("visit", {}, "visit: missing span; expected span, times, companion"),
        ("visit", {**FORMS["visit"][0], "x": 1}, "visit: unknown x; expected span, times, companion"),
    ],
)
def test_what_is_not_a_hints_json_form_is_refused_where_it_stands(name: str, value: Any, said: str) -> None:
    with pytest.raises(ToolError) as caught:
        bind(json_forms, {n: value if n == name else given for n, (given, _) in FORMS.items()})
    assert said in str(caught.value) and str(caught.value).startswith(name)


def test_every_wrong_value_is_told_at_once() -> None:
    with pytest.raises(ToolError) as caught:
        bind(everything, {"count": "2", "node": {"value": 1, "children": [{"value": None}]}, "share": 1})
    assert str(caught.value) == (
        'count is "2": expected a valid integer; node.children[0].value is null: expected a valid integer'
    )


class Point(BaseModel):
    x: int


class Leg(BaseModel):
    start: Point
    end: Point
    place: Place


class Trip(BaseModel):
    legs: list[Leg]
    on: datetime.date


def test_models_share_the_models_inside_them() -> None:
    def f(trip: Trip, leg: Leg, point: Point, place: Place) -> None: ...

    place = {"name": "A", "within": {"name": "B"}}
    leg = {"start": {"x": 1}, "end": {"x": 2}, "place": place}
    trip = {"legs": [leg], "on": "2026-02-03"}
    assert bind(f, {"trip": trip, "leg": leg, "point": {"x": 1}, "place": place}) == {
        "trip": Trip.model_validate(trip),
        "leg": Leg.model_validate(leg),
        "point": Point(x=1),
        "place": Place.model_validate(place),
    }
    with pytest.raises(ToolError, match=r"trip\.legs\[0\]\.place\.name: missing"):
        bind(f, {"trip": {**trip, "legs": [{**leg, "place": {}}]}})


CHECKED = [
    *(str, int, float, bool, None, Unit, Size, Node, Options, Literal["a", 1], list, dict, tuple),
    *(list[int], dict[str, bool], tuple[int, str], tuple[float, ...], list[Node | None]),
    *(int | str, Options | list[str], float | None, Sequence[Unit], dict[str, list[bool | str]]),
]
VALUES = st.recursive(
    st.sampled_from([None, True, 0, 1, 2, 3.0, 0.5, "", "a", "up", "celsius"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "value", "children", "label", "limit", "order"]), inner)
        | st.fixed_dictionaries({"value": st.integers(0, 2)}, optional={"children": inner, "label": inner})
        | st.fixed_dictionaries({"limit": st.integers(0, 2)}, optional={"order": inner})
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("hint", CHECKED, ids=str)
@given(value=VALUES)
@settings(max_examples=25, deadline=None)
def test_what_the_schema_admits_is_bound_and_nothing_else(hint: Any, value: Any) -> None:
    def f(x: Any) -> None: ...

    f.__annotations__["x"] = hint
    tool, binder = read_function(f)
    assert tool.parameters is not None
    schema = json.loads(json.dumps(tool.parameters))
    for definition in schema.get("$defs", {}).values():
        definition["additionalProperties"] = (
            definition["title"] == "Place" if "title" in definition else False
        )
    admitted = jsonschema.Draft202012Validator(schema).is_valid({"x": value})
    try:
        binder(json.dumps({"x": value}))
    except ToolError:
        assert not admitted
    else:
        assert admitted
