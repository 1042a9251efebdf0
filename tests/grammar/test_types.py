"""Python types as schemas: what the answer must be, and the value that it becomes."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Optional, TypedDict

import pydantic
import pytest
import typing_extensions

from mlx_gptoss.errors import SchemaError
from mlx_gptoss.grammar import json_schema_of, parse_reply
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.constraints import constrain


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    seen: datetime.date | None = None


class Pair(NamedTuple):
    left: int
    right: str


class Stop(TypedDict):
    at: str
    colour: NotRequired[Colour]


class Route(TypedDict):
    """A way with stops."""

    stops: list[Stop]
    length: Annotated[int, pydantic.Field(ge=0)]


class OtherStop(typing_extensions.TypedDict):
    at: str


class City(pydantic.BaseModel):
    name: str


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "42", 42),
        (float, "1.5", 1.5),
        (bool, "true", True),
        (str, '"a"', "a"),
        (dict, '{"a": 1}', {"a": 1}),
        (list[str], '["a", "b"]', ["a", "b"]),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (tuple[int, str], '[1, "a"]', (1, "a")),
        (int | None, "null", None),
        (Optional[list[int]], "[1]", [1]),  # noqa: UP045
        (Literal["yes", "no"], '"no"', "no"),
        (datetime.date, '"2026-01-31"', datetime.date(2026, 1, 31)),
        (Colour, '"blue"', Colour.BLUE),
        (Size, "2", Size.LARGE),
        (list[Colour], '["red"]', [Colour.RED]),
        (Point, '{"x": 1, "seen": "2026-01-31"}', Point(1, 0, datetime.date(2026, 1, 31))),
        (list[Point], '[{"x": 1, "y": 2}]', [Point(1, 2)]),
        (Pair, '[1, "a"]', Pair(1, "a")),
        (Stop, '{"at": "Oslo", "colour": "red"}', {"at": "Oslo", "colour": Colour.RED}),
        (OtherStop, '{"at": "Oslo"}', {"at": "Oslo"}),
        (
            Route,
            '{"stops": [{"at": "Oslo"}, {"at": "Rome", "colour": "blue"}], "length": 3}',
            {"stops": [{"at": "Oslo"}, {"at": "Rome", "colour": Colour.BLUE}], "length": 3},
        ),
        (list[Stop | int], '[{"at": "Oslo"}, 3]', [{"at": "Oslo"}, 3]),
        (Annotated[list[Stop], pydantic.Field(max_length=1)], '[{"at": "Oslo"}]', [{"at": "Oslo"}]),
        (City, '{"name": "Oslo"}', City(name="Oslo")),
        (City | Point, '{"x": 1}', Point(1)),
    ],
)
def test_an_answer_follows_a_type_and_becomes_a_value_of_it(
    tok: Tokenizer, hint: Any, text: str, value: Any
) -> None:
    constraint = constrain(tok, schema=hint)
    assert constraint is not None
    shown = json_schema_of(hint)
    assert json.loads(json.dumps(shown)) == shown
    parsed = parse_reply(text, hint)
    assert parsed == value and type(parsed) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in parsed] == [type(item) for item in value]


def test_the_keys_that_a_typed_dict_requires_are_required() -> None:
    assert json_schema_of(Stop)["required"] == ["at"]
    assert json_schema_of(Route)["required"] == ["stops", "length"]


def test_an_answer_that_is_cut_is_no_value() -> None:
    assert parse_reply("[1, 2", list[int]) is None


def test_what_a_type_refuses_is_told() -> None:
    with pytest.raises(SchemaError, match=r"does not pass Point's validation \(x: "):
        parse_reply('{"x": "a"}', Point)
    with pytest.raises(SchemaError, match=r"does not pass list\[int\]'s validation \(1: "):
        parse_reply('[1, "a"]', list[int])


class Recursive(TypedDict):
    inner: list[Recursive]


class Unfinished(pydantic.BaseModel):
    other: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "hint",
    [5, "Point", Point(1), City(name="x"), len, lambda: 1, object(), Tokenizer, type(len), Unfinished, [int]],
)
def test_what_is_no_type_of_json_is_refused_in_one_line(hint: Any) -> None:
    with pytest.raises(
        SchemaError, match="expected a JSON schema as a dict, or a type|has no JSON form"
    ) as caught:
        json_schema_of(hint)
    assert "\n" not in str(caught.value)


def test_sets_cannot_be_enforced_and_say_so(tok: Tokenizer) -> None:
    with pytest.raises(SchemaError, match="uniqueItems"):
        constrain(tok, schema=set[int])
