"""Kernels stand in for operations of decoded tokens, where they may, and leave without a trace."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gptoss import device
from mlx_gptoss.checkpoint.reader import Checkpoint, read_model
from mlx_gptoss.engine.runner import LocalRunner
from mlx_gptoss.model import graph
from mlx_gptoss.model.batch import Segment
from mlx_gptoss.model.graph import Model
from mlx_gptoss.model.kernels import candidates as listed
from mlx_gptoss.model.kernels import verified
from mlx_gptoss.model.kernels.candidates import Step
from mlx_gptoss.model.kernels.decode import DecodeKernels
from mlx_gptoss.model.kernels.kernel import Kernel
from mlx_gptoss.model.kernels.layer import LayerKernels
from mlx_gptoss.model.kernels.record import Record
from mlx_gptoss.model.kernels.verified import UNFINISHED
from mlx_gptoss.model.trace import tell_choices
from tests.model.test_streamed import as_on_a_gpu, streamed
from tests.support.adapters import random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.examiners import end_examiners
from tests.support.random_weights import MlxRecipe, Shape
from tests.support.scheduling import Client, make, run

SHAPE = Shape(layers=4, hidden=64, intermediate=64, experts=16, heads=4, window=16, vocab=160)
WINDOWED, FULL = "attention over a window", "attention over everything"
NAMES = [FULL, WINDOWED, "router", "gate_up", "down"]
Launch = Callable[..., tuple[mx.array, ...]]


class Doubles:
    """Kernels that launch their references; noted, and as bad as a test wants them."""

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.instead: dict[str, Callable[[Launch], Launch]] = {}

    def of(self, factory: Callable[..., Kernel]) -> Callable[..., Kernel]:
        def made(**how: Any) -> Kernel:
            kernel = factory(**how)
            name = kernel.name if "window" not in how else WINDOWED if how["window"] else FULL

            def launch(*inputs: mx.array) -> tuple[mx.array, ...]:
                assert kernel.accepts(*inputs)
                self.launched[name] += 1
                instead = self.instead.get(name)
                return (kernel.reference if instead is None else instead(kernel.reference))(*inputs)

            return replace(kernel, launch=launch)

        return made


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Doubles:
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(listed, "COMPARED_KEYS", (1, 31, 257))
    monkeypatch.setattr(listed, "TIMED_KEYS", (64, 128))
    monkeypatch.setattr(verified, "ROUNDS", 2)
    found = Doubles()
    for name in ("attention", "router", "gate_up", "down"):
        monkeypatch.setattr(listed, name, found.of(getattr(listed, name)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("kernels"), SHAPE)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("M1", tmp_path / "machines.json")


def loaded(folder: Path) -> Model:
    return read_model(Checkpoint(folder, "float32"))


def decode(
    model: Model, sequences: int = 1, adapters: tuple[int, ...] = (0,), kv_bits: Any = (None, None)
) -> np.ndarray:
    """Logits of the 21st token of some sequences that begin alike."""
    runner = LocalRunner(model, kv_bits)
    caches = [runner.make_cache(adapters[i % len(adapters)]) for i in range(sequences)]
    for cache in caches:
        runner.forward(mx.arange(20, dtype=mx.int32), [(20, cache)], [])
    return np.array(runner.forward(mx.arange(sequences, dtype=mx.int32), [(1, c) for c in caches]))


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() < 1e-4)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_decoded_token_goes_through_every_kernel(
    folder: Path, doubles: Doubles, record: Record, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replayed:
        replays(monkeypatch)
    model = loaded(folder)
    plain = decode(model)
    kernels = DecodeKernels(model, "on", record)
    assert [*kernels.used] == NAMES and not doubles.launched
    assert near(decode(model), plain)
    layers = {FULL: 2, WINDOWED: 2, "router": 4, "gate_up": 4, "down": 4}
    assert doubles.launched == layers
    assert near(decode(model), plain)
    # What is replayed is traced once; attention has a length that changes.
    again = {n: 2 * count if n in (FULL, WINDOWED) or not replayed else count for n, count in layers.items()}
    assert doubles.launched == again


def replays(monkeypatch: pytest.MonkeyPatch) -> None:
    if not device.on_gpu() and not shutil.which("g++"):
        pytest.skip("MLX's CPU backend compiles with a C++ compiler")
    monkeypatch.setattr(graph, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "on_gpu", lambda: True)


@pytest.mark.parametrize("name", NAMES)
def test_each_kernel_alone_leaves_the_rest_to_mlx(folder: Path, doubles: Doubles, name: str) -> None:
    model = loaded(folder)
    plain = decode(model)
    for layer in model.layers:
        layer.use(LayerKernels(**listed_by_name(model)[name].bound(layer)))
    assert near(decode(model), plain) and [*doubles.launched] == [name]


def listed_by_name(model: Model) -> dict[str, listed.Candidate]:
    return {candidate.name: candidate for candidate in listed.candidates(model)}


def test_several_rows_share_the_attention_kernels_alone(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    """The others are made for one row: with more, MLX's read the weights more seldom."""
    model = loaded(folder)
    plain = decode(model, 3)
    DecodeKernels(model, "on", record)
    assert near(decode(model, 3), plain)
    assert doubles.launched == {FULL: 6, WINDOWED: 6}


def test_a_prompt_goes_through_none(folder: Path, doubles: Doubles, record: Record) -> None:
    model = loaded(folder)
    DecodeKernels(model, "on", record)
    model(mx.arange(9, dtype=mx.int32), [Segment(9, model.make_cache())])
    assert not doubles.launched


def test_a_row_with_an_adapter_goes_through_no_kernel_that_knows_weights(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    model = loaded(folder)
    kernels = DecodeKernels(model, "on", record)
    runner = LocalRunner(model, kernels=kernels)
    runner.put_adapter(1, random_adapter(model.config, seed=1))
    adapted = decode(model, adapters=(1,))
    assert doubles.launched == {FULL: 2, WINDOWED: 2}
    decode(model)  # beside it, a row without one
    assert doubles.launched == {FULL: 4, WINDOWED: 4, "router": 4, "gate_up": 4, "down": 4}
    assert kernels.distrust(RuntimeError("something")) and not kernels.used
    assert near(decode(model, adapters=(1,)), adapted)
    assert sum(doubles.launched.values()) == 20


def test_quantised_keys_are_left_to_mlx(folder: Path, doubles: Doubles, record: Record) -> None:
    model = loaded(folder)
    plain = decode(model, kv_bits=(8, 8))
    DecodeKernels(model, "on", record)
    assert near(decode(model, kv_bits=(8, 8)), plain)
    assert doubles.launched == {WINDOWED: 2, "router": 4, "gate_up": 4, "down": 4}


def test_streamed_experts_have_no_kernels(folder: Path, doubles: Doubles, record: Record) -> None:
    kernels = DecodeKernels(streamed(folder, 8), "on", record)
    assert not kernels.verdicts and not kernels.used and not kernels.examine_next()


def test_choices_that_are_told_are_told_of_every_step(folder: Path, doubles: Doubles, record: Record) -> None:
    model, told = loaded(folder), list[int]()
    plain = decode(model)
    DecodeKernels(model, "on", record)
    tell_choices(model, lambda layer, ids: told.append(layer))
    assert near(decode(model), plain)
    assert told == [0, 1, 2, 3] * 2 and set(doubles.launched) == {FULL, WINDOWED, "router"}


def test_only_what_a_kernel_takes_is_given_to_it(tmp_path: Path, doubles: Doubles, record: Record) -> None:
    """Experts in other packings than MXFP4 are not; a router that is quantised is unpacked for it."""
    folder = write_checkpoint(tmp_path / "m", SHAPE, layout="mlx", recipe=MlxRecipe(8, 4))
    model = loaded(folder)
    plain = decode(model)
    assert [*DecodeKernels(model, "on", record).used] == [FULL, WINDOWED, "router"]
    assert near(decode(model), plain)


def test_switched_off_there_are_none(folder: Path, doubles: Doubles, record: Record) -> None:
    model = loaded(folder)
    plain = decode(model)
    kernels = DecodeKernels(model, "off", record)
    assert not kernels.verdicts and not kernels.examine_next() and not kernels.distrust(RuntimeError("x"))
    assert np.array_equal(decode(model), plain) and not doubles.launched


# --- verdicts


class Clock:
    """Moved by the steps that are timed: with a kernel they take `own` seconds, without one 0.01."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.own = 0.0, 0.008
        step = Step.__call__

        def timed(this: Step, own: bool) -> list[mx.array]:
            self.now += self.own if own else 0.01
            return step(this, own)

        monkeypatch.setattr(Step, "__call__", timed)

    def __call__(self) -> float:
        return self.now


def test_every_kernel_proves_itself_and_the_next_process_knows(
    folder: Path, doubles: Doubles, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clock = loaded(folder), Clock(monkeypatch)
    plain = decode(model)
    kernels = DecodeKernels(model, "verify", record, clock=clock)
    assert not kernels.used and near(decode(model), plain) and not doubles.launched
    path, used = tmp_path / "machines.json", 0
    while kernels.examine_next():
        assert used <= len(kernels.used) <= used + 1
        used = len(kernels.used)
        assert UNFINISHED.why not in path.read_text()  # between two pieces the process may end
    assert [*kernels.used] == NAMES
    assert [v.gain for v in kernels.used.values()] == [pytest.approx(0.25)] * 5
    doubles.launched.clear()
    assert near(decode(model), plain)
    assert set(doubles.launched) == {*NAMES} - {FULL}  # which pays from 64 keys on
    again = DecodeKernels(loaded(folder), "verify", record)
    assert again.used == kernels.used and not again.examine_next()


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_is_wrong_here_is_off(
    folder: Path, doubles: Doubles, record: Record, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles.instead[name] = lambda launch: (
        lambda *inputs: tuple(
            (y * 1.01).astype(y.dtype) if y.dtype == mx.float32 else y for y in launch(*inputs)
        )
    )
    kernels = DecodeKernels(loaded(folder), "verify", record, clock=Clock(monkeypatch))
    while kernels.examine_next():
        pass
    assert {*kernels.used} == {*NAMES} - {name}
    verdict = kernels.verdicts[name]
    assert verdict is not None and verdict.why.startswith("wrong: off by 1.0e-02")


def test_a_kernel_that_stays_off_has_nothing_traced_anew(
    folder: Path, doubles: Doubles, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clock = loaded(folder), Clock(monkeypatch)
    kernels = DecodeKernels(model, "verify", record, clock=clock)
    used: list[graph.Layer] = []
    use = graph.Layer.use

    def noting(layer: graph.Layer, own: LayerKernels) -> None:
        if any(layer is known for known in model.layers):  # not a copy that is timed
            used.append(layer)
        use(layer, own)

    monkeypatch.setattr(graph.Layer, "use", noting)
    clock.own = 0.02
    assert not kernels.examine("down").on and not used
    clock.own = 0.008
    assert kernels.examine("down").on and used == model.layers
    clock.own = 0.02
    assert not kernels.examine("down").on and used == model.layers * 2


def test_experts_chosen_in_another_order_are_the_same(folder: Path, doubles: Doubles, record: Record) -> None:
    def backwards(launch: Launch) -> Launch:
        def run(*inputs: mx.array) -> tuple[mx.array, ...]:
            rows, chosen, weights = launch(*inputs)
            return rows, chosen[:, ::-1], weights[:, ::-1]

        return run

    doubles.instead["router"] = backwards
    kernels = DecodeKernels(loaded(folder), "verify", record, clock=lambda: 0.0)
    assert kernels.examine("router").why == "not faster: +0.0%"


def test_examinations_of_a_process_take_two_seconds_in_all(
    folder: Path, doubles: Doubles, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    clock.own = 0.5
    kernels = DecodeKernels(loaded(folder), "verify", record, clock=clock)
    while kernels.examine_next():
        pass
    left = [name for name, verdict in kernels.verdicts.items() if verdict is None]
    assert left and clock.now < 4
    assert not kernels.used
    following = DecodeKernels(loaded(folder), "verify", record, clock=clock)
    while following.examine_next():
        pass
    assert following.verdicts[left[0]] is not None


def test_a_kernel_that_ends_its_process_twice_is_off_in_the_next_one(
    folder: Path, doubles: Doubles, record: Record, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def killing(launch: Launch) -> Launch:
        raise Killed

    doubles.instead["router"] = killing
    for _ in range(2):
        following = DecodeKernels(loaded(folder), "verify", record)
        assert following.verdicts["router"] is None
        with pytest.raises(Killed):
            following.examine("router")
        # While its process is there, nobody else believes anything of it.
        assert DecodeKernels(loaded(folder), "verify", record).verdicts["router"] is None
        end_examiners(tmp_path / "machines.json")
    following = DecodeKernels(loaded(folder), "verify", record)
    assert following.verdicts["router"] == UNFINISHED


def test_what_comes_of_a_busy_machine_is_examined_again_by_the_next_process(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    def short(launch: Launch) -> Launch:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    doubles.instead["down"] = short
    kernels = DecodeKernels(loaded(folder), "verify", record)
    verdict = kernels.examine("down")
    assert "Insufficient Memory" in verdict.why and kernels.verdicts["down"] == verdict
    assert DecodeKernels(loaded(folder), "verify", record).verdicts["down"] is None


def test_asked_for_a_kernel_known_to_be_bad_is_still_off(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    doubles.instead["down"] = lambda launch: lambda *inputs: (mx.zeros(1),)
    DecodeKernels(loaded(folder), "verify", record).examine("down")
    assert [*DecodeKernels(loaded(folder), "on", record).used] == [n for n in NAMES if n != "down"]


# --- errors while a model runs


def test_an_error_that_names_a_kernel_turns_it_off_for_good(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    model = loaded(folder)
    kernels = DecodeKernels(model, "on", record)
    program = listed_by_name(model)["gate_up"].kernel.programs[0]
    error = RuntimeError(f"Unable to load kernel custom_kernel_gate_up_{program.text_hash[:12]}")
    assert kernels.distrust(error)
    left = [n for n in NAMES if n != "gate_up"]
    assert [*kernels.used] == left
    decode(model)
    assert "gate_up" not in doubles.launched and doubles.launched["down"] == 4
    assert [*DecodeKernels(loaded(folder), "on", record).used] == left


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("disk"),
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"),
        RuntimeError("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
        RuntimeError("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"),
        RuntimeError(
            "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
        ),
        RuntimeError("Discarded (victim of GPU error/recovery)"),
    ],
)
def test_other_errors_are_no_kernels_fault(
    folder: Path, doubles: Doubles, record: Record, error: Exception
) -> None:
    kernels = DecodeKernels(loaded(folder), "on", record)
    assert not kernels.distrust(error) and [*kernels.used] == NAMES


def broken(path: Path, like: mx.array) -> mx.array:
    """An array that cannot be evaluated."""
    mx.save_safetensors(str(path), {"y": mx.zeros(like.shape, like.dtype)})
    found = mx.load(str(path))
    assert isinstance(found, dict)
    with path.open("r+b") as file:
        file.truncate(120)
    return found["y"]


@pytest.mark.parametrize("when", ["launched", "evaluated"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_request_is_answered_by_the_reference_when_a_kernel_fails(
    folder: Path, doubles: Doubles, record: Record, tmp_path: Path, when: str, sequences: int
) -> None:
    """In the middle of an answer, too; and once it is known, nothing fails any more."""
    prompts = [[*range(i, i + 9)] for i in range(sequences)]

    def answers(model: Model, kernels: DecodeKernels | None) -> list[list[int]]:
        scheduler = make(model)
        scheduler.runner = LocalRunner(model, kernels=kernels)
        clients = [Client(scheduler, p, max_tokens=8 + 6 * i) for i, p in enumerate(prompts)]
        run(scheduler)
        assert all(c.done.finish_reason == "length" for c in clients)
        return [c.tokens for c in clients]

    expected = answers(loaded(folder), None)
    name = "down" if sequences == 1 else FULL  # of one row, or of each

    def failing(launch: Launch) -> Launch:
        def fail(*inputs: mx.array) -> tuple[mx.array, ...]:
            if doubles.launched[name] < 10:
                return launch(*inputs)
            if when == "launched":
                raise RuntimeError("something about a kernel")
            (output,) = launch(*inputs)
            return (broken(tmp_path / "broken.safetensors", output),)

        return fail

    doubles.instead[name] = failing
    model = loaded(folder)
    kernels = DecodeKernels(model, "on", record)
    assert answers(model, kernels) == expected
    assert not kernels.used and doubles.launched[name] >= 10
    doubles.launched.clear()
    assert answers(model, kernels) == expected and not doubles.launched


def test_kernels_are_examined_in_quiet_moments_after_the_first_answer(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    model = loaded(folder)
    kernels = DecodeKernels(model, "verify", record, clock=lambda: 0.0)
    scheduler = make(model)
    scheduler.runner = LocalRunner(model, kernels=kernels)
    assert not scheduler.step() and not any(kernels.verdicts.values())
    client = Client(scheduler, [1, 2, 3], max_tokens=2)
    while client.end is None:
        scheduler.step()
        assert not any(kernels.verdicts.values())
    for _ in range(20):
        assert scheduler.step()
    another = Client(scheduler, [1, 2, 3, 4], max_tokens=3)  # does not wait for all of it
    while another.end is None:
        before = len(kernels.used)
        scheduler.step()
        assert len(kernels.used) == before
    run(scheduler)
    assert all(kernels.verdicts.values())


def test_a_model_that_is_dropped_frees_its_weights_at_once(
    folder: Path, doubles: Doubles, record: Record
) -> None:
    decode(loaded(folder))
    gc.collect()
    before = mx.get_active_memory()
    gc.disable()
    try:
        model = loaded(folder)
        kernels = DecodeKernels(model, "on", record)
        decode(model)
        held = mx.get_active_memory() - before
        del model, kernels
        assert held > 100_000
        assert mx.get_active_memory() - before < held // 100
    finally:
        gc.enable()
