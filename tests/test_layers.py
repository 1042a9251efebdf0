"""Imports only point down: the house's floors, read from the sources. This table is the only one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts.count_imports import cycles, graph, room_of, sources

ROOT = Path(__file__).resolve().parent.parent

# Every room (a folder, or a module beside the folders) and its floor. A new one is given its place here.
FLOORS = {
    "command_buffers": 0,
    "errors": 0,
    "device": 1,
    "files": 0,
    "sizes": 0,
    "markdown": 1,
    "sampling": 1,
    "tokenizer": 1,
    "model": 2,
    "harmony": 2,
    "checkpoint": 3,
    "grammar": 3,
    "tools": 3,
    "engine": 4,
    "mcp": 4,
    "chat": 5,
    "distributed": 5,
    "tune": 5,
    "llm": 6,
    "convert": 6,
    "doctor": 7,
    "server": 7,
    "cli": 8,
    "__init__": 9,
    "__main__": 9,
}
# The rooms inside the server.
SERVER_FLOORS = {
    "settings": 0,
    "http": 1,
    "translate": 2,
    "memory": 3,
    "model_facts": 3,
    "running": 3,
    "tools": 3,
    "state": 4,
    "anthropic": 5,
    "lmstudio": 5,
    "ollama": 5,
    "openai": 5,
    "page": 5,
    "status_routes": 5,
    "tokenizer_routes": 5,
    "models_routes": 5,
    "gate": 5,
    "app": 6,
    "run": 7,
    "__init__": 7,
}
MODULES = sorted(sources(ROOT))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    house = graph(ROOT)
    place = room_of(module)
    for target, line in house[module].items():
        floor = FLOORS[room_of(target)]
        where = f"{module}, line {line}, imports {target}"
        assert floor < FLOORS[place] or room_of(target) == place, f"{where}, which is not below it"
        if place == room_of(target) == "server":
            above, below = SERVER_FLOORS[room_of(module, 2)], SERVER_FLOORS[room_of(target, 2)]
            assert below < above or room_of(module, 2) == room_of(target, 2), (
                f"{where}, which is not below it"
            )


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycles(graph(ROOT)) == []


def test_every_room_has_a_floor() -> None:
    assert {room_of(m) for m in MODULES} == set(FLOORS)
    assert {room_of(m, 2) for m in MODULES if room_of(m) == "server"} == set(SERVER_FLOORS)


def test_every_module_says_what_it_holds() -> None:
    paths = sources(ROOT).values()
    assert not [p for p in paths if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]


def test_every_source_stays_readable_in_one_sitting() -> None:
    paths = sources(ROOT).values()
    assert not {str(p): n for p in paths if (n := p.read_text(encoding="utf-8").count("\n")) > 600}
