"""A mutant meets the tests that run its statement; what that is, is read from the source."""

from __future__ import annotations

import pytest

from scripts.mutants_bench import spans

SOURCE = """\
LIMIT = 3

class Box:
    size: int = 1

    def take(
        self, n: int = 2
    ) -> int:
        if n > LIMIT:
            raise ValueError(
                n
            )
        try:
            return n
        except KeyError:
            return 0
"""


@pytest.mark.parametrize(
    ("line", "first", "last"),
    [
        (1, 1, 1),
        (4, 4, 4),
        (7, 6, 8),  # what a def line says is run on import
        (9, 9, 9),  # a condition, without what it decides
        (11, 10, 12),
        (14, 14, 14),
        (15, 15, 15),
    ],
)
def test_a_line_belongs_to_its_statement(line: int, first: int, last: int) -> None:
    assert next(spans(SOURCE, line)) == range(first, last + 1)


def test_around_a_statement_are_its_function_its_class_and_the_module() -> None:
    assert list(spans(SOURCE, 9))[1:] == [range(6, 17), range(3, 17), range(1, 17)]
