"""Count the imports between the rooms of the package: python scripts/count_imports.py [ROOT ..].

A room is a folder of mlx_gptoss/ or a module beside the folders; convert/ is one too. Every import counts,
inside functions and behind TYPE_CHECKING as well. Given several roots (checkouts), their counts stand side
by side.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE, WING = "mlx_gptoss", "convert"


@cache
def sources(root: Path) -> dict[str, Path]:
    """Every module by its dotted name without the package's: "engine.scheduler", "convert.plan"."""
    found = {}
    for top in (PACKAGE, WING):
        for path in (root / top).rglob("*.py"):
            parts = path.relative_to(root if top == WING else root / PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def room_of(module: str, depth: int = 1) -> str:
    """The room of a module; at depth 2 the room inside that room."""
    parts = module.split(".")
    return parts[depth - 1] if len(parts) >= depth else "__init__"


@cache
def graph(root: Path) -> dict[str, dict[str, int]]:
    """Each module -> the modules it imports, with a line that does."""
    modules = sources(root)
    edges: dict[str, dict[str, int]] = {}
    for module, path in modules.items():
        edges[module] = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node):
                target = _resolve(name, modules)
                if target is not None and target != module:
                    edges[module].setdefault(target, node.lineno)  # type: ignore[attr-defined]
    return edges


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"line {node.lineno}: a relative import; write it from {PACKAGE}")
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _resolve(name: str, modules: dict[str, Path]) -> str | None:
    """The module that "mlx_gptoss.engine.core.Engine" is in; None when it is another package's."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 1, -1):
        if (module := ".".join(parts[1:end])) in modules:
            return module
    return "__init__"


def rooms(root: Path) -> dict[str, set[str]]:
    """Each room -> the rooms it imports from."""
    found: dict[str, set[str]] = {}
    for module, targets in graph(root).items():
        room = found.setdefault(room_of(module), set())
        room |= {room_of(t) for t in targets} - {room_of(module)}
    return found


def cycles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """The groups of modules that import each other in a circle (strongly connected components)."""
    reach = {m: _reachable(m, edges) for m in edges}
    groups = {tuple(sorted(n for n in reach[m] if m in reach[n])) for m in edges}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reachable(start: str, edges: dict[str, dict[str, int]]) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for target in edges[left.pop()]:
            if target not in seen:
                seen.add(target)
                left.append(target)
    return seen


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms lie below each, one upon the other; rooms in a circle share a floor."""
    level = dict.fromkeys(arrows, 0)
    for _ in arrows:
        for room, targets in arrows.items():
            level[room] = min(max((level[t] + 1 for t in targets), default=0), len(arrows))
    return level


def main(roots: list[Path]) -> None:
    """Print the rooms of each checkout, by floor."""
    for root in roots:
        arrows = rooms(root)
        circles = cycles({room: dict.fromkeys(targets, 0) for room, targets in arrows.items()})
        told = "; ".join(" <-> ".join(c) for c in circles) or "none"
        lines = {
            room: sum(
                p.read_text(encoding="utf-8").count("\n")
                for m, p in sources(root).items()
                if room_of(m) == room
            )
            for room in arrows
        }
        level = floors(arrows)
        print(f"{root.resolve().name}: {len(arrows)} rooms, {sum(map(len, arrows.values()))} arrows between,")
        print(f"  {sum(lines.values()):,} lines, circles: {told}")
        for room in sorted(arrows, key=lambda r: (level[r], r)):
            print(f"  {level[room]:2} {room:18}{lines[room]:7,}  {' '.join(sorted(arrows[room]))}")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path(__file__).resolve().parent.parent])
