"""What an engine may be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.errors import RequestError

LEAST: dict[str, Any] = {
    "max_context": 64,
    "kv_budget": 1,
    "prefill_chunk": 1,
    "max_running": 1,
    "max_waiting": 0,
    "draft_tokens": 1,
}


@pytest.mark.parametrize("name", LEAST)
def test_a_number_is_taken_from_its_least_on_and_nothing_else(name: str) -> None:
    least = LEAST[name]
    for value in (least, least + 1):
        given: dict[str, Any] = {name: value}
        assert getattr(EngineOptions(**given), name) == value
    wrong: list[Any] = [least - 1, -1, True, float(least + 1), str(least + 1)]
    for value in wrong:
        with pytest.raises(RequestError, match=f"{name} is .*expected a whole number >= {least}") as caught:
            EngineOptions(**(given | {name: value}))
        assert caught.value.field == name


@pytest.mark.parametrize(
    ("given", "bits"),
    [(None, (None, None)), (8, (8, 8)), (4, (4, 4)), ((8, 4), (8, 4)), ((None, 8), (None, 8))],
)
def test_one_number_of_bits_is_that_of_keys_and_values(given: Any, bits: Any) -> None:
    assert EngineOptions(kv_bits=given).bits == bits


@pytest.mark.parametrize("given", [3, 16, "8", (8,), (8, 4, 4), (8, 5), (3, 8)])
def test_other_bits_are_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="kv_bits is"):
        EngineOptions(kv_bits=given)
