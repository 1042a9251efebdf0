"""What scripts/mutants.py needs of pytest: which tests run which lines, or to run chosen tests in order.

MUTANTS_RECORD=FILE makes FILE a JSON object: `seconds` of each test; `shared`, the seconds of the fixtures
that several tests share; `spawning`, the tests that start processes, whose lines are not seen; `lines`, for
each file of the package the tests that run a line, by their number in `seconds`. A line that a shared fixture
runs counts for every test that uses the fixture. MUTANTS_TESTS=FILE runs the tests of a JSON list.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

PACKAGE = Path("mlx_gptoss").resolve()


class Recorder:
    """Gives coverage's data a context for every test and every shared fixture."""

    def __init__(self, path: Path) -> None:
        import coverage

        self._path = path
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=[f"{PACKAGE}/*"])
        self._coverage.set_option("run:core", "ctrace")  # the one that knows contexts
        self._coverage.start()
        self._context = ""
        self._seconds: dict[str, float] = {}
        self._shared = self._shared_now = 0.0
        self._fixtures: dict[str, list[str]] = {}
        self._spawning: set[str] = set()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _: object) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            self._spawning.add(self._context)

    def _switch(self, context: str) -> str:
        before, self._context = self._context, context
        self._coverage.switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._fixtures[item.nodeid] = list(getattr(item, "fixturenames", ()))
        self._switch(item.nodeid)
        start, self._shared_now = time.perf_counter(), 0.0
        try:
            return (yield)
        finally:
            self._switch("")
            self._seconds[item.nodeid] = round(time.perf_counter() - start - self._shared_now, 4)
            self._shared += self._shared_now

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        before, start = self._switch(f"fixture {fixturedef.argname}"), time.perf_counter()
        try:
            return (yield)
        finally:
            self._switch(before)
            self._shared_now += time.perf_counter() - start

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        users: dict[str, list[str]] = {test: [test] for test in self._fixtures}
        for test, names in self._fixtures.items():
            for name in names:
                users.setdefault(f"fixture {name}", []).append(test)
        number = {test: i for i, test in enumerate(self._fixtures)}

        def tests(contexts: set[str]) -> list[int]:
            return sorted({number[test] for context in contexts for test in users.get(context, ())})

        lines = {
            str(Path(file).relative_to(PACKAGE.parent)): {
                line: found
                for line, contexts in data.contexts_by_lineno(file).items()
                if (found := tests(set(contexts)))
            }
            for file in data.measured_files()
        }
        spawning = sorted({test for context in self._spawning for test in users.get(context, ())})
        made = {"seconds": self._seconds, "shared": self._shared, "spawning": spawning, "lines": lines}
        self._path.write_text(json.dumps(made), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Record what the tests run, if asked to."""
    if path := os.environ.get("MUTANTS_RECORD"):
        config.pluginmanager.register(Recorder(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests that were chosen, in their order."""
    if path := os.environ.get("MUTANTS_TESTS"):
        order = {test: i for i, test in enumerate(json.loads(Path(path).read_text(encoding="utf-8")))}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])
