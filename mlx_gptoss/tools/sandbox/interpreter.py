"""The process that runs the model's Python: cells in, output out.

It shuts itself in, says what holds, and then executes one cell after another in one namespace, as a notebook
does. A cell comes as a line of JSON. Whatever is written to stdout and stderr is its output; its end is told
on a pipe of its own. Nothing depends on what is said there: the supervisor freezes this process then, and
ends it when it does not answer at once.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import json
import linecache
import os
import resource
import signal
import sys
import threading
import traceback
from typing import Any

from mlx_gptoss.tools.sandbox import paths

MAX_HANDLES, MAX_THREADS = 256, 256
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38


def shut_in(layers: list[str], files: str, root: str, supervisor: int) -> list[str]:
    """Leave this process `files` to write and Python to read; no network, no processes, no signals.

    Returns the layers that hold. Raises OSError where the system does not offer enough of them.
    """
    readable = paths.readable()
    if sys.platform == "darwin":
        from mlx_gptoss.tools.sandbox import profile_macos

        profile_macos.apply(files, readable)
        return layers
    from mlx_gptoss.tools.sandbox import landlock, namespaces, seccomp

    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if "namespaces" in layers:
        namespaces.leave_for(root, files, readable)
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))  # counted in the namespace
    namespaces.drop_capabilities()
    if "landlock" in layers and landlock.abi() < landlock.GUARDS_TRUNCATION:
        if "namespaces" not in layers:
            raise OSError(errno.ENOSYS, "it takes user namespaces, or the Landlock of Linux 6.2 or later")
        layers = [layer for layer in layers if layer != "landlock" or landlock.abi() > 0]
    end_with(supervisor)
    if "landlock" in layers:
        landlock.restrict_files(files, readable)
    if "seccomp" in layers:
        seccomp.restrict_calls()
    return layers


def end_with(supervisor: int) -> None:
    """Have the kernel end this process when its parent ends. Linux only; elsewhere the limit on time is left.

    To be called after what changes the rights of this process: that undoes it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        sys.exit("the supervisor ended")


def limit(options: dict[str, Any]) -> None:
    """Resource limits. macOS does not enforce the address space: the supervisor watches there."""
    limits = {
        resource.RLIMIT_AS: options["memory"],
        resource.RLIMIT_FSIZE: options["file_size"],
        resource.RLIMIT_CORE: 0,
    }
    if options["layers"]:
        limits |= {
            resource.RLIMIT_CPU: options["processor_seconds"],
            resource.RLIMIT_NOFILE: MAX_HANDLES,
            resource.RLIMIT_MEMLOCK: 0,
        }
    for kind, value in limits.items():
        allowed = resource.getrlimit(kind)[1]
        value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if sys.platform != "darwin":
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


def serve(answers: int) -> None:
    """Take cells from stdin until there are no more; "sync" lines are answered with what they carry."""
    cells = os.fdopen(os.dup(0), "r", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    number, threads = 0, threading.active_count()
    for line in cells:
        message = json.loads(line)
        if "sync" in message:
            os.write(answers, f"{message['sync']}\n".encode())
            continue
        number += 1
        run_cell(message["cell"], f"<cell {number}>", namespace)
        before, threads = threads, threading.active_count()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
                if threads > before and stream is sys.stdout:
                    os.write(
                        1, b"[threads of this cell have not ended: they stand still until the next one]\n"
                    )
            except (OSError, ValueError):  # closed by the cell: its output ends here all the same
                continue
        os.write(answers, b"done\n")


def main() -> None:
    """Shut this process in, and run cells."""
    options = json.loads(sys.argv[1])
    answers, layers = options["answers"], options["layers"]
    os.umask(0o077)
    problem = ""
    try:
        limit(options)
        if layers:
            layers = shut_in(layers, options["files"], options["root"], options["supervisor"])
        else:
            end_with(options["supervisor"])
    except OSError as error:
        problem = str(error)
    os.write(answers, json.dumps({"problem": problem, "layers": layers}).encode() + b"\n")
    if not problem:
        serve(answers)
