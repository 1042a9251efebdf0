"""What the code imports is declared, what is declared is imported, and each has a lower bound."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from scripts.lowest import bounds

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CLIENTS = ROOT / "tests" / "server" / "clients"  # scripts of environments of their own
OWN = {"mlx_gptoss", "tests", "benchmarks", "demo", "scripts"}
# What scripts alone import is not installed with the tests.
DISTRIBUTIONS = {"PIL": ["pillow"], **packages_distributions()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def declared(requirements: list[str]) -> set[str]:
    """The canonical names of the distributions that these require, this one aside."""
    names = {canonical(re.split(r"[\[<>=;, ]", requirement)[0]) for requirement in requirements}
    return names - {canonical(PROJECT["name"])}


CORE = declared(PROJECT["dependencies"])
GGUF, MCP, TRAIN, TEST, DEV = (declared(EXTRAS[extra]) for extra in ("gguf", "mcp", "train", "test", "dev"))
BUILD = declared(PYPROJECT["build-system"]["requires"])


def imports(*folders: str, top_level: bool = False) -> Iterator[tuple[str, set[str]]]:
    """Each import of another project's package: its place, and the distributions that may bring it.

    top_level: only what the import of a module itself imports, not what its functions do.
    """
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        if CLIENTS in path.parents:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body if top_level else ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            for package in {name.split(".")[0] for name in names} - OWN - sys.stdlib_module_names:
                found = DISTRIBUTIONS.get(package, [package])
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {package}", {canonical(d) for d in found}


def undeclared(allowed: set[str], *folders: str, top_level: bool = False) -> list[str]:
    return [place for place, names in imports(*folders, top_level=top_level) if not names & allowed]


def imported(*folders: str) -> set[str]:
    return {name for _, names in imports(*folders) for name in names}


def commands(*folders: str) -> set[str]:
    """Every string constant in these folders, such as "mypy" in a list that subprocess.run is given."""
    trees = [
        ast.parse(p.read_text(encoding="utf-8")) for folder in folders for p in (ROOT / folder).rglob("*.py")
    ]
    return {str(n.value) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant)}


def test_what_the_package_imports_is_declared() -> None:
    assert not undeclared(CORE | GGUF | MCP, "mlx_gptoss", "convert")


def test_an_extra_is_imported_only_where_it_is_used() -> None:
    assert not undeclared(CORE, "mlx_gptoss", "convert", top_level=True)


def test_what_tests_benchmarks_and_scripts_import_is_declared() -> None:
    assert not undeclared(CORE | TEST | GGUF | MCP | TRAIN, "tests", "benchmarks")
    assert not undeclared(CORE | TEST | DEV, "scripts")
    assert not undeclared(CORE | TRAIN, "demo")
    assert not undeclared(CORE, "examples")


def test_collecting_the_tests_needs_nothing_of_the_training() -> None:
    assert not undeclared(CORE | TEST | GGUF | MCP, "tests", top_level=True)


@pytest.mark.parametrize(
    ("requirements", "folders"),
    [(CORE, ["mlx_gptoss", "convert"]), (GGUF, ["convert"]), (MCP, ["mlx_gptoss"]), (TRAIN, ["demo"])],
    ids=["core", "gguf", "mcp", "train"],
)
def test_what_is_declared_is_imported(requirements: set[str], folders: list[str]) -> None:
    assert requirements <= imported(*folders)


def test_what_tests_and_developers_declare_they_import_or_run() -> None:
    used = imported("mlx_gptoss", "convert", "tests", "benchmarks") | commands("tests")
    assert used >= {name.removeprefix("types-") for name in TEST}
    make = set(re.findall(r"\$\(BIN\)/(\w+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert imported("scripts") | commands("scripts") | make | BUILD >= DEV


def test_the_lock_has_every_requirement_as_it_is_allowed() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    locked = {canonical(name): version for name, version in (re.split("==| ;", line)[:2] for line in lines)}
    for name, bound in bounds(PROJECT, ["dev"]).items():
        assert release(locked[canonical(name)]) >= release(bound), name


def test_every_requirement_has_a_lower_bound() -> None:
    lowest = bounds(PROJECT, list(EXTRAS))
    assert {canonical(name) for name in lowest} >= CORE | GGUF | MCP | TRAIN | TEST | DEV
    with pytest.raises(ValueError, match="'numpy<3' has no lower bound"):
        bounds({"name": "x", "dependencies": ["numpy<3"]}, [])
    with pytest.raises(ValueError, match="numpy has two lower bounds"):
        bounds({"name": "x", "dependencies": ["numpy>=2", "numpy>=2.1; python_version > '3.12'"]}, [])
