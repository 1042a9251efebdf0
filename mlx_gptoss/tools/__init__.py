"""Built-in tools as gpt-oss was trained to call them: `python` and `browser`. Off unless enabled by name.

A tool has a `namespace` (what the model is shown) and `handle` (what a call returns to the model). Errors
that the model can act on are returned as text, like any other result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mlx_gptoss.errors import ToolError

__all__ = ["BUILTIN", "BuiltinTool", "builtin_tools"]

if TYPE_CHECKING:
    from mlx_gptoss.harmony import ToolCall, ToolNamespace


@runtime_checkable
class BuiltinTool(Protocol):
    """What a session needs of a built-in tool."""

    @property
    def namespace(self) -> ToolNamespace:
        """The declaration for the system message."""
        ...

    def handle(self, call: ToolCall) -> str:
        """The result of a call, whose name is that of the namespace or "namespace.function"."""
        ...

    def close(self) -> None:
        """Give up processes and files. The tool can be used again afterwards."""
        ...


def _python(folder: Path | str | None, unsafe: bool) -> BuiltinTool:
    from mlx_gptoss.tools.python import PythonTool

    return PythonTool(unsafe=unsafe)


def _browser(folder: Path | str | None, unsafe: bool) -> BuiltinTool:
    from mlx_gptoss.tools.browser import BrowserTool
    from mlx_gptoss.tools.pages import FolderPages

    if folder is None:
        raise ToolError("the browser has nothing to read: give it a folder of pages", "browser")
    return BrowserTool(FolderPages(folder))


# The built-in tools by name: the only list of them.
BUILTIN = {"python": _python, "browser": _browser}


def builtin_tools(
    names: Sequence[str], *, folder: Path | str | None = None, unsafe_python: bool = False
) -> list[BuiltinTool]:
    """The built-in tools of these names; `folder` is what `browser` reads.

    Raises ToolError for an unknown name, a browser without a folder, or a `python` that cannot be isolated
    on this machine (unless `unsafe_python`).
    """
    for name in names:
        if name not in BUILTIN:
            raise ToolError(f"{name!r} is no built-in tool: expected one of {', '.join(BUILTIN)}", "builtin")
    return [BUILTIN[name](folder, unsafe_python) for name in dict.fromkeys(names)]
