"""Imports only point down: the house's floors, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOF, WING = 6, "convert"

# A module or folder of the package, and its floor. A new one is given its place here.
FLOORS = {
    "errors": 0,
    "config": 0,
    "platform": 0,
    "safetensors_file": 0,
    "cache": 1,
    "cpu": 1,
    "linear": 1,
    "sampling": 1,
    "tokenizer": 1,
    "stops": 1,
    "grammar": 2,
    "harmony": 2,
    "model": 2,
    "checkpoint": 3,
    "generate": 3,
    "hub": 3,
    "plan": 3,
    "engine": 4,
    "engine_options": 4,
    "generation": 4,
    "prefix": 4,
    "prefix_disk": 4,
    "request": 4,
    "running": 4,
    "scheduler": 4,
    "session": 4,
    "speculate": 4,
    "tools": 4,
    "worker": 4,
    "server": 5,
    "cli": ROOF,
    "terminal": ROOF,
    "__init__": ROOF,
    "__main__": ROOF,
}


def sources() -> list[Path]:
    return sorted([*(ROOT / "mlx_gptoss").rglob("*.py"), *(ROOT / WING).rglob("*.py")])


def home(path: Path) -> str:
    """The module or folder of the package that a source belongs to."""
    parts = path.relative_to(ROOT).parts
    return WING if parts[0] == WING else parts[1].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and module or folder of every import out of the package, wherever in the source it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write it from mlx_gptoss"
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if module == "mlx_gptoss" else [module]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "mlx_gptoss" and rest != "__version__":
                found.append((node.lineno, rest.partition(".")[0] or "__init__"))
            assert top != WING, f"{path}: imports {name}; it is installed as mlx_gptoss.{WING}"
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    place = home(path)
    for line, target in imported(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {target}"
        # `from mlx_gptoss import name` takes a public name, unless it is a module.
        target = target if target in FLOORS or target == WING else "__init__"
        if place == WING:
            assert target == WING or FLOORS[target] <= 3, f"{where}: the wing may use floors 0 to 3"
        elif target == WING:
            assert FLOORS[place] == ROOF, f"{where}: only the roof may use the wing"
        else:
            assert FLOORS[target] <= FLOORS[place], f"{where}, which is above it"


def test_every_module_has_a_floor():
    homes = {home(p) for p in sources()} - {WING}
    assert homes <= set(FLOORS), f"give these a floor: {sorted(homes - set(FLOORS))}"


def test_every_module_says_what_it_holds():
    silent = [p for p in sources() if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not silent


def test_every_source_stays_readable_in_one_sitting():
    long = {str(p): n for p in sources() if (n := p.read_text(encoding="utf-8").count("\n")) > 600}
    assert not long
