"""Where mutants are tried: a copy of the tree, and which tests of it run a line of the package."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scripts.count_imports import PACKAGE, room_of, sources

ROOT = Path(__file__).resolve().parent.parent

# Each room -> the tests that have to notice a change in it: its own, and those of rooms it is tested through.
TESTS = {
    "engine": ("tests/engine", "tests/chat"),
    "chat": ("tests/chat", "tests/engine/test_core.py", "tests/grammar/test_engine.py"),
    "model": ("tests/model", "tests/engine", "tests/checkpoint/test_reader.py"),
    "harmony": ("tests/harmony", "tests/chat", "tests/grammar/test_tools.py"),
    "grammar": ("tests/grammar", "tests/chat"),
    "checkpoint": (
        "tests/checkpoint",
        "tests/convert/test_bad_input.py",
        "tests/model/test_parity.py",
        "tests/engine/test_prefix.py",
    ),
    "convert": ("tests/convert",),
    "doctor": ("tests/doctor",),
}

# Tests of so many seconds run after all others.
SLOW = 0.2
NO_TESTS = 5  # pytest's exit status when there was nothing to run


def digest(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_files(entries: Iterable[str]) -> list[str]:
    """The test files of folders and files, as paths from the root."""
    found: list[Path] = []
    for path in (ROOT / entry for entry in entries):
        found += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    return [str(f.relative_to(ROOT)) for f in found]


class Bench:
    """A copy of the tree in the form it is installed in, to run tests on mutants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        hidden = shutil.ignore_patterns(".*", "build", "shared", "__pycache__", "node_modules")
        shutil.copytree(ROOT, folder, ignore=hidden)
        (folder / "convert").rename(folder / "mlx_gptoss" / "convert")
        (folder / "convert").symlink_to(Path("mlx_gptoss", "convert"))

    def pytest(
        self, arguments: Sequence[str], limit: float = 3600, compiled: bool = False, **environment: str
    ) -> tuple[int | None, str]:
        """(exit status, output) of a test run; None after `limit` seconds."""
        temporary = self.folder / "build" / "temporary"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        options += ["-p", "scripts.mutants_plugin", f"--basetemp={temporary / 'pytest'}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *arguments],
            cwd=self.folder,
            env={
                **os.environ,
                **environment,
                "PYTHONPATH": str(self.folder),
                "TMPDIR": str(temporary),
                "PYTHONDONTWRITEBYTECODE": "" if compiled else "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            for _ in range(round(limit)):  # in short waits: no time counts while everything is stopped
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=1)
                    return process.returncode, output
            return None, ""
        finally:  # also of what the tests started and left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def compile(self, files: Sequence[str]) -> None:
        """Compile the tests and what they import.

        Nothing else writes .pyc files: that of a mutant could not be told from that of the code.
        """
        status, output = self.pytest(["--collect-only", *files], compiled=True)
        if status != 0:
            raise SystemExit(f"the tests cannot be collected:\n{output[-3000:]}")

    def try_out(self, module: str, source: str, stages: Sequence[Stage]) -> tuple[str, str]:
        """(outcome, the test that failed) for a module whose source is changed to this."""
        path = self.folder / sources(ROOT)[module].relative_to(ROOT)
        chosen = self.folder / "build" / "tests.json"
        original, stat = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(source, encoding="utf-8")
        try:
            for stage in stages:
                chosen.write_text(json.dumps(stage.tests), encoding="utf-8")
                status, output = self.pytest(stage.files, stage.limit, MUTANTS_TESTS=str(chosen))
                if status is None:
                    return "timeout", ""
                if status not in (0, NO_TESTS):
                    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                    return "killed", failed[0] if failed else output[-300:]
            return "survived", ""
        finally:
            path.write_text(original, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@dataclass(frozen=True)
class Stage:
    """Tests to run in this order, the files they are in, and the seconds they may take."""

    tests: list[str]
    files: list[str]
    limit: float


@dataclass(frozen=True)
class TestFile:
    """What scripts/mutants_plugin.py recorded of a test file on the unchanged code."""

    seconds: dict[str, float]
    shared: float
    spawning: list[str]
    lines: dict[str, dict[str, list[int]]]

    def running(self, source: str, lines: range) -> set[str]:
        """The tests that run one of these lines of a source file."""
        names, ran = list(self.seconds), self.lines.get(source, {})
        return {names[i] for line in lines for i in ran.get(str(line), ())}


class Lines:
    """Which tests run a line of the package. Measured file by file, and kept while neither side changes."""

    def __init__(self, bench: Bench, kept: Path, files: Sequence[str]) -> None:
        kept.mkdir(parents=True, exist_ok=True)
        code = "".join(path.read_text(encoding="utf-8") for _, path in sorted(sources(ROOT).items()))
        self._files: dict[str, TestFile] = {}
        for file in files:
            name, stamp = file.replace("/", "-"), digest(code + (ROOT / file).read_text(encoding="utf-8"))
            path = kept / f"{name}.{stamp}.json"
            if not path.exists():
                for old in kept.glob(f"{name}.*"):
                    old.unlink()
                for _ in range(3):  # a thread may fail to start while coverage begins to trace another
                    status, output = bench.pytest([file], MUTANTS_RECORD=str(path))
                    if status == 0:
                        break
                else:
                    path.unlink(missing_ok=True)
                    raise SystemExit(f"{file} fails on the unchanged code:\n{output[-3000:]}")
                print(f"measured {file}", flush=True)
            self._files[file] = TestFile(**json.loads(path.read_text(encoding="utf-8")))

    def stages(self, module: str, source: str, line: int) -> list[Stage]:
        """Tests for a change at a line: those that run its statement, likely files and quick tests first.

        What runs on import counts as run by the tests of the function, the class or the module around it.
        """
        room, own = room_of(module), sources(ROOT)[module].relative_to(ROOT)
        path = str(own if own.parts[0] == PACKAGE else Path(PACKAGE, own))
        files = [file for file in test_files(TESTS[room]) if file in self._files] or list(self._files)
        for lines in spans(source, line):
            found = {file: self._files[file].running(path, lines) for file in files}
            if any(found.values()):
                break
        else:
            found = {file: set(self._files[file].seconds) for file in files}
        for file in files:
            found[file] |= set(self._files[file].spawning)
        name = module.rpartition(".")[2].partition("_")[0]

        def likely(file: str) -> tuple[bool, bool, int]:
            return name not in Path(file).stem, room not in Path(file).parts, -len(found[file])

        quick, slow = [], []
        for file in sorted(files, key=likely):
            seconds = {test: s for test, s in self._files[file].seconds.items() if test in found[file]}
            quick.append((file, [test for test, s in seconds.items() if s < SLOW]))
            slow.append((file, [test for test, s in seconds.items() if s >= SLOW]))
        return [self._stage(tests) for tests in (quick[:2], quick[2:] + slow) if any(t for _, t in tests)]

    def _stage(self, tests: Sequence[tuple[str, list[str]]]) -> Stage:
        files = list(dict.fromkeys(file for file, some in tests if some))
        seconds = sum(self._files[file].seconds[test] for file, some in tests for test in some)
        shared = sum(self._files[file].shared for file in files)
        return Stage([test for _, some in tests for test in some], files, 20 + 5 * (seconds + shared))


def spans(source: str, line: int) -> Iterator[range]:
    """The lines of the statement at a line, of the functions and classes around it, and of all the module."""
    found = []
    for node in ast.walk(_parsed(source)):
        if not isinstance(node, ast.stmt | ast.excepthandler):
            continue
        last = node.end_lineno or node.lineno
        body: list[ast.stmt] = getattr(node, "body", [])
        if node.lineno <= line <= last:
            if body and line < body[0].lineno:
                found.append(range(node.lineno, body[0].lineno))
            if not body or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.append(range(node.lineno, last + 1))
    yield from sorted(found, key=len)
    yield range(1, len(source.splitlines()) + 1)


_parsed = cache(ast.parse)
