"""Whether a kernel of ours may stand in for MLX's operations on this machine: only if it is right and faster.

It is compiled and run on the model's own weights, several times and at several lengths, and compared with
its reference; then a step of the model is timed with it and without it. The verdict is kept for the next
process. A kernel that takes the whole process down twice is off from then on: whoever examines it enters
beforehand who that is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_gptoss.device import is_resource_error
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
# Processes that ended in the middle of examining before that is put down to the kernel: one may be told to.
DEATHS = 2
STARTED = time.time()  # tells this process from an earlier one with its number

Outputs: TypeAlias = Sequence[mx.array]
Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel is used, from steps of which size on (an attention's keys), and why or why not.

    gain: by what share a step is faster where it is used, at least. lasting: whether the next process may
    rely on it; not where the machine may have been too busy.
    """

    on: bool
    why: str
    since: int = 0
    gain: float | None = None
    lasting: bool = field(default=True, compare=False)


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
            why = f"fails: {type(error).__name__}: {lines[0][:200]}"
            return Verdict(False, why, lasting=not is_resource_error(error))
        spent += clock() - start
        if spent > budget:
            return Verdict(False, "takes too long to examine", lasting=False)
        yield


def keep(name: str, verdict: Verdict, record: Record) -> None:
    """Remember a verdict."""
    record.put(SECTION, name, asdict(verdict))


def tried(name: str, record: Record) -> bool:
    """Whether an examination has begun, so that one without a lasting verdict lets others go first."""
    return record.get(SECTION, name) is not None


def known(name: str, record: Record) -> Verdict | None:
    """The verdict of an earlier examination; None where there is none that makes sense, or that lasts."""
    found = record.get(SECTION, name)
    if _deaths(found) >= DEATHS:
        return UNFINISHED
    kinds = {"on": bool, "why": str, "since": int, "gain": float | int | None, "lasting": bool}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        return None
    if not found["lasting"] or not all(isinstance(found[k], kind) for k, kind in kinds.items()):
        return None
    return Verdict(**found)


@contextmanager
def at_risk(name: str, record: Record) -> Iterator[None]:
    """While a piece of an examination runs: enter this process, should the kernel take it down.

    What leaves by an Exception, KeyboardInterrupt or SystemExit has not taken it down.
    """
    own = {"pid": os.getpid(), "started": STARTED}
    record.change(SECTION, name, lambda old: {**own, "deaths": _deaths(old)})

    def left(old: Any) -> Any:
        if not _is_mark(old) or (old["pid"], old["started"]) != (own["pid"], own["started"]):
            return old  # another process's
        return {**old, "pid": 0} if old["deaths"] else None

    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        record.change(SECTION, name, left)
        raise
    record.change(SECTION, name, left)


def _is_mark(found: Any) -> bool:
    """Whether it was entered by `at_risk`. pid: 0 between two pieces."""
    kinds = {"pid": int, "started": float, "deaths": int}
    return (
        isinstance(found, dict)
        and found.keys() == kinds.keys()
        and all(isinstance(found[k], kind) for k, kind in kinds.items())
    )


def _deaths(found: Any) -> int:
    """How many processes have ended while they examined the kernel."""
    if not _is_mark(found):
        return 0
    ended = found["pid"] > 0 and not _runs(found["pid"], found["started"])
    return int(found["deaths"]) + ended


def _runs(pid: int, started: float) -> bool:
    """Whether a process is there. Another one that has got its number since passes for it."""
    if pid == os.getpid():
        return started == STARTED
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


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
