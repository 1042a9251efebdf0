"""Every kernel, run by the emulator, gives what MLX's operations give. `make metal` runs many more cases."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss.model.kernels import kernel as kernels
from tests.metal import cases
from tests.metal.cases import Case
from tests.metal.emulator import Emulator, Report, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Emulator:
    """Kernels are run by it, on shuffled threads."""
    made = Emulator(seed=7, traced=getattr(request, "param", False))
    monkeypatch.setattr(kernels, "run", made.run)
    return made


def problems(some: Iterator[Case]) -> list[str]:
    return [problem for case in some if (problem := case.run())]


@pytest.mark.usefixtures("emulator")
def test_lengths_around_window_tile_and_stretch() -> None:
    assert not problems(cases.edges(mx.float32, (*cases.WINDOW_EDGES, 32, 257)))


@pytest.mark.usefixtures("emulator")
def test_equal_experts_are_chosen_once_each() -> None:
    assert not problems(cases.equals(mx.float32))


@pytest.mark.usefixtures("emulator")
def test_nan_and_infinity_come_out_where_the_reference_has_them() -> None:
    assert not problems(cases.not_finite(mx.float32))


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("seed", [2, 3, 5, 8])
def test_random_shapes_and_dtypes(seed: int) -> None:
    assert not problems(map(cases.drawn, [seed]))


@pytest.mark.parametrize("emulator", [True], indirect=True)
def test_weights_keys_and_values_are_read_exactly_once(emulator: Emulator) -> None:
    for case, once in cases.read_once(hidden=64, experts=6):
        assert not case.run()
        assert cases.read_otherwise(emulator.reports, once) == [], case.about
        emulator.reports.clear()


def test_more_loads_than_one_are_noticed() -> None:
    report = Report("some", 0, 0, {"weight": np.array([1, 1, 2, 0], np.uint8)})
    for expected, wrong in (([1, 1], True), ([1, 1, 2, 0], False)):
        assert bool(cases.read_otherwise([report], {"weight": np.array(expected)})) == wrong


def test_a_kernel_takes_what_it_can_and_nothing_else() -> None:
    for seed in range(8):
        case = cases.drawn(seed)
        accepts, inputs = case.kernel.accepts, case.inputs
        assert accepts(*inputs)
        for i, array in enumerate(inputs):
            other = array.astype(mx.float32 if array.dtype != mx.float32 else mx.float16)
            assert not accepts(*inputs[:i], other, *inputs[i + 1 :]), (case.about, i)
    for case in (
        cases.gate_up_case(1, mx.float32, hidden=64, outputs=64, experts=4, k=2, tokens=5),
        cases.down_case(1, mx.float32, hidden=64, outputs=64, experts=4, k=2, tokens=5),
        cases.router_case(1, mx.float32, hidden=64, experts=4, k=2, tokens=5),
        cases.attention_case(1, mx.float32, keys=9, window=0, queries=5),
    ):
        assert not case.kernel.accepts(*case.inputs)


def test_the_text_depends_on_no_length() -> None:
    """Else Metal would compile as a reply grows."""
    launched: list[object] = []

    def noting(program: object, inputs: object, launch: kernels.Launch) -> list[mx.array]:
        launched.append((program, launch.template))
        return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", noting)
        for keys in (300, 5000, 40000):
            case = cases.attention_case(keys, mx.float32, keys=keys, window=0, kv_heads=1, group=1)
            case.kernel(*case.inputs)
    assert len(set(launched)) == 2 < len(launched)
