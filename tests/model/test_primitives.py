"""The decode step stays lean: kernels launched per layer and token, counted from the graph."""

from __future__ import annotations

import pytest

from benchmarks.primitives import measure


@pytest.mark.parametrize(("bits", "most"), [(None, 20), (8, 21)])
def test_a_layer_of_a_decoded_token_is_at_most_21_primitives(bits: int | None, most: int) -> None:
    result = measure("ours", bits)
    assert 10 < result["per_layer"] <= most
    assert result["primitives"]["GatherQMM"] == 2


@pytest.mark.parametrize("bits", [None, 8])
def test_with_kernels_of_our_own_a_layer_is_at_most_12(bits: int | None) -> None:
    result = measure("kernels", bits)
    assert 10 < result["per_layer"] <= 12
    assert not {"GatherQMM", "ArgPartition", "Softmax"} & result["primitives"].keys()
