"""The `python` tool: the model's code, executed cell by cell in a process of its own that is shut in.

The process keeps its variables between calls, has no network, writes to one empty temporary folder only,
and is limited in time, memory and output (`sandbox/`). Before it is used for the first time, everything in
`sandbox/probes.py` is tried to get out: where something crucial is open, the tool refuses to work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.tools.sandbox import host, selftest
from mlx_gptoss.tools.sandbox.host import DISK_SHARE, Limits, Sandbox

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ToolCall, ToolNamespace

_CURE = "leave it off, or run without isolation (unsafe=True, --unsafe-python) if you trust the code"


class PythonTool:
    """A notebook in a sealed process.

    seconds: of wall time for a cell. memory: bytes, of which a quarter may be files. output: characters of a
    cell's output that the model gets to see. unsafe: run without isolation; the code can then do whatever
    the user can.

    Raises ToolError where this machine offers no isolation, unless `unsafe`.
    """

    def __init__(
        self, *, seconds: float = 120.0, memory: int = 2 << 30, output: int = 20_000, unsafe: bool = False
    ) -> None:
        for name, value in (("seconds", seconds), ("memory", memory), ("output", output)):
            if not value > 0:
                raise RequestError(f"{name} is {value!r}: expected a number above 0", name)
        self._limits = Limits(seconds, int(memory), int(output))
        self._layers = () if unsafe else host.LAYERS
        self._sandbox: Sandbox | None = None
        self.weaknesses: tuple[str, ...] = ()
        """What the self-test found open that is not crucial, such as "names outside"."""
        if not unsafe:  # find out now whether it can work
            self._test()
            self._start()

    @property
    def namespace(self) -> ToolNamespace:
        """As the model was taught it, with what holds here: the time, the folder, no network."""
        from mlx_gptoss.harmony import PYTHON, ToolNamespace

        text = (
            PYTHON.description.replace("120.0", f"{self._limits.seconds:.1f}")
            .replace("The drive at '/mnt/data'", "The current working directory")
            .replace("is UNKNOWN. Depends on the cluster.", "is disabled.")
        )
        return ToolNamespace(PYTHON.name, text)

    def handle(self, call: ToolCall) -> str:
        """What the code printed, the value of its last expression, or its traceback."""
        return self.run(call.arguments)

    def run(self, code: str) -> str:
        """Execute a cell. Raises ToolError when the process cannot be started."""
        if self._sandbox is None or not self._sandbox.alive:
            self._start()
        assert self._sandbox is not None
        result = self._sandbox.run(code)
        if result.ended == "done":
            return result.text
        mib = self._limits.memory >> 20
        reason = {
            "time": f"TimeoutError: the code ran for more than {self._limits.seconds:g} seconds "
            "and was stopped.",
            "memory": f"MemoryError: the process used more than {mib} MiB and was stopped.",
            "files": f"OSError: the files took more than {mib // DISK_SHARE} MiB or were too many; "
            "the process was stopped and they were deleted.",
            "threads": "RuntimeError: the process had too many threads and was stopped.",
            "forged": "RuntimeError: the code reported its own end, went on, and was stopped.",
        }.get(result.ended, f"The Python process ended (exit status {result.status}).")
        gap = "\n" if result.text and not result.text.endswith("\n") else ""
        return f"{result.text}{gap}{reason} All variables are lost."

    def close(self) -> None:
        """End the process and delete its folder."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def __enter__(self) -> PythonTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sandbox"):
            self.close()

    def _start(self) -> None:
        self.close()
        try:
            self._sandbox = Sandbox(self._limits, self._layers)
        except ToolError as error:
            raise _refusal(str(error)) from None

    def _test(self) -> None:
        try:
            holes = selftest.holes(self._layers)
        except ToolError as error:
            raise _refusal(str(error)) from None
        if crucial := [hole.name for hole in holes if hole.crucial]:
            shown = ", ".join(crucial[:5]) + (f" and {len(crucial) - 5} more" if len(crucial) > 5 else "")
            raise _refusal(f"its self-test got through with: {shown}")
        self.weaknesses = tuple(hole.name for hole in holes)


def _refusal(problem: str) -> ToolError:
    return ToolError(f"the python tool cannot be isolated on this machine ({problem}); {_CURE}", "python")
