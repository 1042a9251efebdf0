"""Properties of the engine's thread: jobs in order, steps in between, and an end that loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mlx_gptoss.engine.worker import Worker
from mlx_gptoss.errors import GptOssError


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test")
    yield made
    made.close()


def test_jobs_run_in_order_on_one_thread(worker: Worker) -> None:
    seen: list[tuple[int, int]] = []
    for i in range(5):
        worker.post(lambda i=i: seen.append((i, threading.get_ident())))  # type: ignore[misc]
    ident = worker.call(threading.get_ident)
    assert seen == [(i, ident) for i in range(5)] and ident != threading.get_ident()
    assert not worker.inside and worker.call(lambda: worker.inside)


def test_a_call_gives_back_what_its_job_returns_or_raises(worker: Worker) -> None:
    assert worker.call(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        worker.call(lambda: exec("raise SystemExit"))
    assert worker.call(lambda: worker.call(lambda: 8)) == 8


def test_steps_run_while_there_is_more_and_once_after_a_job(worker: Worker) -> None:
    steps, idle = [0], threading.Event()

    def step() -> bool:
        steps[0] += 1
        if steps[0] >= 4:
            idle.set()
        return steps[0] < 4

    worker.call(lambda: setattr(worker, "step", step))
    counts = []
    for _ in range(3):
        assert idle.wait(10)
        idle.clear()
        counts.append(worker.call(lambda: steps[0]))
    assert idle.wait(10)
    idle.clear()
    worker.wake()
    assert idle.wait(10)
    assert counts == [4, 5, 6] and steps == [8]


def test_a_job_does_not_wait_for_the_last_step(worker: Worker) -> None:
    begun = threading.Event()

    def step() -> bool:
        begun.set()
        return True

    worker.call(lambda: setattr(worker, "step", step))
    assert begun.wait(10)
    for i in range(3):
        assert worker.call(lambda i=i: i) == i  # type: ignore[misc]
    worker.call(lambda: setattr(worker, "step", None))


def test_a_job_or_a_step_that_fails_does_not_end_the_thread(worker: Worker) -> None:
    worker.post(lambda: 1 / 0)
    assert worker.call(lambda: 1) == 1
    fails = iter([True, True, False])
    done = threading.Event()

    def step() -> bool:
        if next(fails):
            raise ValueError("a bad step")
        done.set()
        return False

    worker.call(lambda: setattr(worker, "step", step))
    assert done.wait(10)  # what failed may have left something to do, so it is tried again


def test_closing_runs_what_was_posted_then_the_last_job_and_takes_no_more() -> None:
    worker, log = Worker("test"), list[str]()
    hold = threading.Event()
    worker.post(lambda: hold.wait(10))
    worker.post(lambda: log.append("posted"))
    threading.Timer(0.01, hold.set).start()
    worker.close(lambda: log.append("last"))
    assert log == ["posted", "last"]
    with pytest.raises(GptOssError, match="closed"):
        worker.post(lambda: None)
    with pytest.raises(GptOssError, match="closed"):
        worker.call(lambda: None)
    worker.wake()
    worker.close(lambda: log.append("again"))
    assert log == ["posted", "last"]


def test_a_worker_can_be_closed_from_inside() -> None:
    worker, done = Worker("test"), threading.Event()
    worker.call(lambda: worker.close(done.set))
    assert done.wait(10)
