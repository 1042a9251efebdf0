"""A kernel is used only where it is right and faster; whatever else it does, there is a verdict."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gptoss.model.kernels import verified
from mlx_gptoss.model.kernels.kernel import Kernel, Program
from mlx_gptoss.model.kernels.record import MACHINES, Record
from mlx_gptoss.model.kernels.verified import (
    UNFINISHED,
    Examination,
    Verdict,
    at_risk,
    examine,
    examining,
    keep,
    known,
)

LENGTHS = (1, 127, 128, 129, 1000)
Launch = Callable[[mx.array], tuple[mx.array, ...]]


class Clock:
    """A clock that only the work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reference(x: mx.array) -> tuple[mx.array, ...]:
    """A row's softmax, and its largest element's place."""
    return mx.softmax(x, axis=-1), mx.argmax(x, axis=-1)


def made(
    launch: Launch = reference,
    clock: Clock | None = None,
    *,
    cost: Callable[[int], float] = lambda size: 0.8,
    accepts: Callable[[mx.array], bool] = lambda x: True,
    dtype: mx.Dtype = mx.float32,
    sizes: Sequence[int] = (64,),
) -> Examination:
    """A double of a kernel in its examination; a step takes 1 ms without it, and `cost` ms with it."""
    clock = clock or Clock()
    program = Program("double", ("x",), ("y",), "y[0] = x[0];")

    def step(size: int) -> Callable[[bool], list[mx.array]]:
        def run(own: bool) -> list[mx.array]:
            clock.now += cost(size) / 1000 if own else 0.001
            return [mx.zeros(1)]

        return run

    return Examination(
        Kernel("double", (program,), accepts, launch, reference),
        f"double of 2 rows {program.text_hash}",
        [lambda n=n: [mx.random.normal((2, n), key=mx.random.key(n)).astype(dtype)] for n in LENGTHS],  # type: ignore[misc]
        [(size, step(size)) for size in sizes],
    )


def changed(
    change: Callable[[mx.array], mx.array], only: Callable[[mx.array], bool] = lambda x: True
) -> Launch:
    """The reference with something wrong in its softmax, for some inputs."""

    def launch(x: mx.array) -> tuple[mx.array, ...]:
        y, place = reference(x)
        return (change(y) if only(x) else y), place

    return launch


def raising(x: mx.array) -> tuple[mx.array, ...]:
    raise RuntimeError(
        "Unable to build metal library from source\nprogram_source:7:1: error: 'foo' undeclared"
    )


def later(count: int, launch: Launch) -> Launch:
    """Right for the first so many runs."""
    runs: list[int] = []

    def some(x: mx.array) -> tuple[mx.array, ...]:
        runs.append(1)
        return reference(x) if len(runs) <= count else launch(x)

    return some


def poisoned(value: float) -> Launch:
    return changed(lambda y: mx.where(mx.arange(y.shape[-1]) == y.shape[-1] - 1, value, y))


BAD: dict[str, tuple[Launch, str]] = {
    "wrong": (changed(lambda y: y + 0.1), "wrong: off by"),
    "a little wrong": (changed(lambda y: y * 1.001), r"wrong: off by \S+e-0[34]"),
    "all zeros": (changed(mx.zeros_like), r"wrong: off by 1\.0e\+00"),
    "one element unwritten": (poisoned(-1.0), "wrong: off by"),
    "NaN": (poisoned(float("nan")), "wrong: NaN or infinity"),
    "infinite": (poisoned(float("inf")), "wrong: NaN or infinity"),
    "another place": (lambda x: (reference(x)[0], reference(x)[1] + 1), "wrong: other numbers"),
    "wrong at one length": (changed(lambda y: y * 2, lambda x: x.shape[1] == 129), r"inputs \(2, 129\)"),
    "wrong beyond a length": (changed(lambda y: y[::-1], lambda x: x.shape[1] > 999), r"\(2, 1000\)"),
    "wrong at the second run": (later(1, changed(lambda y: y * 2)), r"inputs \(2, 1\)"),
    "wrong at the last run": (later(14, changed(lambda y: y * 2)), r"inputs \(2, 1000\)"),
    "another dtype": (changed(lambda y: y.astype(mx.float16)), "other shapes or dtypes"),
    "another shape": (changed(lambda y: y[:1]), "other shapes or dtypes"),
    "an output too few": (lambda x: reference(x)[:1], "other shapes or dtypes"),
    "does not compile": (raising, "fails: RuntimeError: Unable to build metal library from source$"),
    "fails at the second run": (later(1, raising), "fails: RuntimeError"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_kernel_is_off_and_the_verdict_says_why(name: str) -> None:
    launch, why = BAD[name]
    examination = made(launch)
    verdict = examine(examination, clock=Clock())
    assert not verdict.on and verdict.gain is None
    assert re.search(why, verdict.why), verdict.why


def test_a_kernel_that_fails_once_it_is_evaluated_is_off(tmp_path: Path) -> None:
    """As one that Metal's compiler refuses: MLX compiles when it evaluates."""
    path = tmp_path / "gone.safetensors"
    mx.save_safetensors(str(path), {"y": mx.zeros((2, 1 << 16))})
    broken = mx.load(str(path))
    assert isinstance(broken, dict)
    with path.open("r+b") as file:
        file.truncate(200)
    verdict = examine(made(lambda x: (broken["y"][:, : x.shape[1]], reference(x)[1])), clock=Clock())
    assert not verdict.on and verdict.why.startswith("fails: RuntimeError")


def test_a_right_and_faster_kernel_is_on() -> None:
    clock = Clock()
    verdict = examine(made(clock=clock), clock=clock)
    assert verdict.on and verdict.why == "right, and a step is 25.0% faster" and verdict.since == 64


@pytest.mark.parametrize(("cost", "on"), [(0.96, True), (0.98, False), (1.0, False), (3.0, False)])
def test_a_kernel_is_on_from_three_percent_on(cost: float, on: bool) -> None:
    clock = Clock()
    verdict = examine(made(clock=clock, cost=lambda size: cost), clock=clock)
    assert verdict.on == on and verdict.gain == pytest.approx(1 / cost - 1)


def test_a_kernel_is_used_from_the_size_on_from_which_it_always_pays() -> None:
    sizes, costs = (16, 64, 256, 1024), {16: 0.5, 64: 1.1, 256: 0.9, 1024: 0.7}
    clock = Clock()
    verdict = examine(made(clock=clock, cost=costs.__getitem__, sizes=sizes), clock=clock)
    assert verdict.on and verdict.since == 256 and verdict.gain == pytest.approx(1 / 0.9 - 1)
    costs[1024] = 1.1
    assert not examine(made(clock=clock, cost=costs.__getitem__, sizes=sizes), clock=clock).on


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_tolerance_is_that_of_the_dtype(dtype: mx.Dtype) -> None:
    """A few roundings are let through, and nothing that is ten times as far off."""
    unit = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}[dtype]

    def verdict(off: float) -> Verdict:
        clock = Clock()
        return examine(
            made(changed(lambda y: (y * (1 + off)).astype(dtype)), clock, dtype=dtype), clock=clock
        )

    assert verdict(2 * unit).on
    assert not verdict(20 * verified.TOLERANCE[dtype]).on


def test_infinity_is_right_where_the_reference_has_it() -> None:
    infinite = mx.array([1.0, float("inf"), float("nan")])
    assert not verified.difference(infinite, infinite)
    assert verified.difference(mx.array([1.0, 2.0, float("nan")]), infinite)
    assert verified.difference(mx.array([1.0, -float("inf"), float("nan")]), infinite)


def test_outputs_whose_order_is_free_are_brought_into_one() -> None:
    def backwards(x: mx.array) -> tuple[mx.array, ...]:
        y, place = reference(x)
        return y[:, ::-1], place

    def ordered(outputs: Sequence[mx.array]) -> Sequence[mx.array]:
        return [mx.sort(outputs[0], axis=-1), outputs[1]]

    clock = Clock()
    examination = made(backwards, clock)
    assert not examine(examination, clock=clock).on
    assert examine(replace(examination, ordered=ordered), clock=clock).on


def test_a_kernel_for_other_shapes_is_off() -> None:
    verdict = examine(made(accepts=lambda x: x.shape[1] < 1000), clock=Clock())
    assert not verdict.on and verdict.why == "does not take these shapes"


def test_what_happens_between_two_pieces_takes_none_of_the_time() -> None:
    clock, count = Clock(), 0
    pieces = examining(made(clock=clock), clock=clock)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            assert end.value.on and end.value.gain == pytest.approx(0.25)
            break
        count += 1
        clock.now += 1.0
    assert count == verified.REPEATS * len(LENGTHS) + verified.ROUNDS


@pytest.mark.parametrize("where", ["comparison", "step"])
def test_a_kernel_that_takes_too_long_is_off(where: str) -> None:
    """It is left alone as soon as it gives the program back: nothing in this process can do more."""
    clock, runs = Clock(), list[int]()

    def slow(x: mx.array) -> tuple[mx.array, ...]:
        runs.append(1)
        clock.now += 0.7 if where == "comparison" else 0
        return reference(x)

    verdict = examine(made(slow, clock, cost=lambda size: 700.0), clock=clock)
    assert not verdict.on and verdict.why == "takes too long to examine"
    assert clock.now < verified.BUDGET + 0.8 and (where == "step" or len(runs) == 3)


# --- the record


def test_a_verdict_is_kept_for_the_machine_and_by_name(tmp_path: Path) -> None:
    path, clock = tmp_path / "deep" / "machines.json", Clock()
    examination = made(clock=clock)
    record = Record("M1", path)
    assert known(examination.name, record) is None
    verdict = examine(examination, clock=clock)
    keep(examination.name, verdict, record)
    assert verdict.on and known(examination.name, Record("M1", path)) == verdict
    assert known(examination.name, Record("M2", path)) is None
    assert known(f"{examination.name}0", record) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"M1": 3}', "\0" * 9, "[" * 10_000])
def test_a_broken_record_is_told_and_written_anew(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "machines.json"
    path.write_text(text)
    record, verdict = Record("M1", path), Verdict(True, "right", 1, 0.5)
    with caplog.at_level(logging.WARNING):
        assert known("a", record) is None and known("a", record) is None
    assert [str(path) in message and "passed over" in message for message in caplog.messages] == [True]
    keep("a", verdict, record)
    assert known("a", Record("M1", path)) == verdict


@pytest.mark.parametrize(
    "value",
    [
        True,
        {},
        {"on": True},
        {"on": 1, "why": "", "since": 0, "gain": None, "lasting": True},
        {"on": True, "why": "", "since": "0", "gain": 1, "lasting": True},
    ],
)
def test_a_verdict_that_makes_no_sense_is_none(tmp_path: Path, value: object) -> None:
    record = Record("M1", tmp_path / "machines.json")
    record.put(verified.SECTION, "a", value)
    assert known("a", record) is None


def test_what_other_processes_found_stays_and_old_machines_go(tmp_path: Path) -> None:
    path = tmp_path / "machines.json"
    for i in range(2 * MACHINES):
        keep("a", Verdict(False, f"{i}"), Record(f"M{i}", path))
        keep("b", Verdict(False, "b"), Record(f"M{i}", path))
    kept = [i for i in range(2 * MACHINES) if known("a", Record(f"M{i}", path)) == Verdict(False, f"{i}")]
    assert kept == list(range(MACHINES, 2 * MACHINES))
    assert all(known("b", Record(f"M{i}", path)) for i in kept)
    assert [p.name for p in tmp_path.iterdir()] == ["machines.json"]


def test_a_record_that_cannot_be_written_is_told_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    clock = Clock()
    with caplog.at_level(logging.WARNING):
        keep("a", examine(made(clock=clock), clock=clock), Record("M1", tmp_path / "file" / "machines.json"))
    assert any("is not written" in message for message in caplog.messages)


def test_nothing_is_lost_where_several_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "machines.json"

    def write(writer: int) -> None:
        for i in range(10):
            keep(f"{writer} {i}", Verdict(False, "x"), Record("M1", path))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    record = Record("M1", path)
    assert all(known(f"{writer} {i}", record) for writer in range(4) for i in range(10))


def test_two_processes_that_end_in_the_middle_are_put_down_to_the_kernel(tmp_path: Path) -> None:
    """Killed between two of an examination's marks, as by a crash or by SIGTERM."""
    path = tmp_path / "machines.json"
    ending = (
        "import os, signal, sys; from pathlib import Path\n"
        "from mlx_gptoss.model.kernels.record import Record\n"
        "from mlx_gptoss.model.kernels.verified import at_risk\n"
        "with at_risk('a', Record('M1', Path(sys.argv[1]))): os.kill(os.getpid(), signal.SIGTERM)"
    )
    record = Record("M1", path)
    for _ in range(2):
        assert known("a", record) is None
        ended = subprocess.run([sys.executable, "-c", ending, str(path)], check=False)
        assert ended.returncode == -signal.SIGTERM
        if known("a", record) is None:
            with at_risk("a", record):  # a piece that goes well is no verdict yet
                assert known("a", record) is None
    assert known("a", record) == UNFINISHED
