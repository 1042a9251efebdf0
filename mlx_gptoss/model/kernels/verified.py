"""Whether a kernel of ours may stand in for MLX's operations on this machine: only if it is right and faster.

It is compiled and run on the model's own weights, several times and at several lengths, and compared with
its reference; then a step of the model is timed with it and without it. The verdict is kept for the next
process. A kernel that takes the whole process down is off in the next one: whoever examines it enters it as
unfinished beforehand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from mlx_gptoss.model.kernels.kernel import Kernel
from mlx_gptoss.model.kernels.record import Record

logger = logging.getLogger("mlx_gptoss.model")

SECTION = "kernels"
# Seconds that one examination may take.
BUDGET = 2.0
LEAST_GAIN = 0.03
# The largest difference, as a share of the reference's largest value. In half precision the reference rounds
# after each operation, and the kernel once.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 4e-3, mx.bfloat16: 3e-2}
REPEATS = 3  # of each comparison
ROUNDS = 6  # of each timing; the first warms up and the fastest counts

Outputs: TypeAlias = Sequence[mx.array]
Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel is used, from steps of which size on (an attention's keys), and why or why not.

    gain: by what share a step is faster where it is used, at least.
    """

    on: bool
    why: str
    since: int = 0
    gain: float | None = None


UNFINISHED = Verdict(False, "its examination did not come to an end")


@dataclass(frozen=True)
class Examination:
    """A kernel, and what it is examined with.

    name: tells apart all that the verdict is about. inputs: make the arrays that it is compared on. steps: by
    size, ascending; each makes the outputs of one step of the model, lazily, with the kernel (True) or
    without. ordered: brings outputs whose order is free into one that can be compared.
    """

    kernel: Kernel
    name: str
    inputs: Sequence[Callable[[], Sequence[mx.array]]]
    steps: Sequence[tuple[int, Callable[[bool], Outputs]]]
    ordered: Callable[[Outputs], Outputs] = lambda outputs: outputs


class _Refused(Exception):
    """The kernel is not to be used; says why."""


def examine(examination: Examination, *, clock: Clock = time.perf_counter, budget: float = BUDGET) -> Verdict:
    """Compare and time a kernel. Whatever it does, there is a verdict."""
    pieces = examining(examination, clock=clock, budget=budget)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict


def examining(
    examination: Examination, *, clock: Clock = time.perf_counter, budget: float = BUDGET
) -> Generator[None, None, Verdict]:
    """`examine` in small pieces, between which something else may be done; budget: seconds of all pieces."""
    spent, work = 0.0, _compare_and_time(examination, clock)
    while True:
        start = clock()
        try:
            next(work)
        except StopIteration as end:
            verdict: Verdict = end.value
            return verdict
        except _Refused as refused:
            return Verdict(False, str(refused))
        except Exception as error:  # a kernel may fail in any way; none of them may reach a request
            logger.info("the kernel %s fails", examination.name, exc_info=error)
            lines = str(error).splitlines() or [""]
            return Verdict(False, f"fails: {type(error).__name__}: {lines[0][:200]}")
        spent += clock() - start
        if spent > budget:
            return Verdict(False, "takes too long to examine")
        yield


def keep(name: str, verdict: Verdict | None, record: Record) -> None:
    """Remember a verdict, or that there is none."""
    record.put(SECTION, name, None if verdict is None else asdict(verdict))


def known(name: str, record: Record) -> Verdict | None:
    """The verdict of an earlier examination; None where there is none that makes sense."""
    found = record.get(SECTION, name)
    kinds = {"on": bool, "why": str, "since": int, "gain": float | int | None}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        return None
    return Verdict(**found) if all(isinstance(found[k], kind) for k, kind in kinds.items()) else None


def _compare_and_time(examination: Examination, clock: Clock) -> Generator[None, None, Verdict]:
    kernel = examination.kernel
    for make in examination.inputs:
        inputs = list(make())
        mx.eval(inputs)
        if not kernel.accepts(*inputs):
            raise _Refused("does not take these shapes")
        expected = list(examination.ordered(kernel.reference(*inputs)))
        mx.eval(expected)
        for _ in range(REPEATS):
            found = list(examination.ordered(kernel(*inputs)))
            mx.eval(found)
            if [(a.shape, a.dtype) for a in found] != [(a.shape, a.dtype) for a in expected]:
                raise _Refused("wrong: other shapes or dtypes than its reference")
            sizes = ", ".join(str(tuple(a.shape)) for a in inputs)
            for a, b in zip(found, expected, strict=True):
                if told := difference(a, b):
                    raise _Refused(f"wrong: {told} for inputs {sizes}")
            yield
    gains = []
    for size, step in examination.steps:
        best = {True: float("inf"), False: float("inf")}
        for i in range(ROUNDS):
            for own in (True, False):
                start = clock()
                mx.eval(step(own))
                if i:
                    best[own] = min(best[own], clock() - start)
            yield
        gains.append((size, best[False] / best[True] - 1 if best[True] else 0.0))
    return _judged(gains)


def difference(found: mx.array, expected: mx.array) -> str:
    """What is wrong with an array, given the right one; "" for nothing."""
    if expected.dtype not in TOLERANCE:
        return "" if mx.array_equal(found, expected) else "other numbers than its reference's"
    a, b = (np.array(x.astype(mx.float32)) for x in (found, expected))
    known = np.isfinite(b)
    if not np.isfinite(a[known]).all():
        return "NaN or infinity"
    if not np.array_equal(a[~known], b[~known], equal_nan=True):
        return "a number where its reference has none"
    largest = float(np.abs(b[known]).max(initial=0))
    off = float(np.abs(a[known] - b[known]).max(initial=0))
    share = off / largest if largest else float(off > 0)
    return f"off by {share:.1e} of the largest value" if share > TOLERANCE[expected.dtype] else ""


def _judged(gains: Sequence[tuple[int, float]]) -> Verdict:
    """The verdict on a right kernel, by what it gains at each size."""
    since, least = None, float("inf")
    for size, gain in reversed(gains):
        if gain < LEAST_GAIN:
            break
        since, least = size, min(least, gain)
    if since is None:
        return Verdict(False, f"not faster: {gains[-1][1]:+.1%}", gain=gains[-1][1])
    return Verdict(True, f"right, and a step is {least:.1%} faster", since, least)
