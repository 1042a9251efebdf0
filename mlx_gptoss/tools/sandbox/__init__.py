"""A process that is shut in, for code that a model wrote, and the processes around it.

    host.py          the caller's side: starts the supervisor, sends it cells
    supervisor.py    starts the interpreter, holds it to its limits, freezes it between cells
    interpreter.py   shuts itself in and runs the cells: namespaces, Landlock, seccomp; on macOS Seatbelt
    probes.py        attempts to get out; selftest.py makes them on this machine

Supervisor and interpreter import the standard library only.
"""

__all__: list[str] = []  # its modules are imported by name
