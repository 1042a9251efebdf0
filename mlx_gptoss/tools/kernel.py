"""The process that runs the model's Python: cells in, output out. Standard library only; started by path.

It shuts itself in (`jail.py`, or the macOS sandbox it was started in), checks that it is shut in, says so,
and then executes one cell after another in one namespace, as a notebook does. A cell comes as a line of
JSON on stdin. Whatever is written to stdout and stderr is its output; a marker that came with the cell ends
it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import linecache
import os
import resource
import socket
import sys
import tempfile
import traceback
from typing import Any


def escapes(outside: str) -> list[str]:
    """What this process can do that an isolated one cannot."""
    found = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent
        found.append("open network connections")
    except OSError:
        pass
    try:
        handle, path = tempfile.mkstemp(dir=outside)
        os.close(handle)
        os.unlink(path)
        found.append("write outside its folder")
    except OSError:
        pass
    try:
        os.listdir(os.path.expanduser("~"))
        found.append("read the home folder")
    except OSError:
        pass
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        found.append("start processes")
    except OSError:
        pass
    return found


def limit(memory: int, file_size: int) -> None:
    """Resource limits in bytes. macOS does not enforce the address space: the parent watches there."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if kind == resource.RLIMIT_AS and sys.platform != "darwin":
                raise


def run_cell(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute a cell; the value of a last expression is shown. Exceptions are printed, none gets out."""
    code += "\n"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        tree = ast.parse(code, name)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(last, name, "eval"), namespace)
            if value is not None:
                namespace["_"] = value
                print(repr(value))
    except SyntaxError:
        traceback.print_exc(limit=0)
    except BaseException as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # without run_cell's own
        traceback.print_exception(type(error), error, frames)


def main() -> None:
    """Serve cells."""
    options = json.loads(sys.argv[1])
    cells = os.fdopen(os.dup(0), "r", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    problem = ""
    if options["isolate"]:
        try:
            if sys.platform.startswith("linux"):
                here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail.py")
                spec = importlib.util.spec_from_file_location("jail", here)
                assert spec is not None and spec.loader is not None
                jail = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(jail)
                jail.shut_in(options["folder"])
        except OSError as error:
            problem = str(error)
        else:
            problem = ", ".join(escapes(options["outside"]))
            problem = problem and f"its process can still {problem}"
    limit(options["memory"], options["file_size"])
    print(json.dumps({"problem": problem}), flush=True)
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    for number, line in enumerate(cells, 1):
        cell = json.loads(line)
        run_cell(cell["code"], f"<cell {number}>", namespace)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # closed by the cell: its output ends here all the same
                continue
        os.write(1, cell["marker"].encode())


if __name__ == "__main__":
    main()
