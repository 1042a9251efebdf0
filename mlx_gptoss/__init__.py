"""gpt-oss on Apple Silicon through MLX.

    import mlx_gptoss as gptoss

    llm = gptoss.load("openai/gpt-oss-20b")
    print(llm.respond("Why is the sky blue?").text)

The public names are those of `__all__`; each is imported from its module at first use, so that importing
the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_gptoss.chat.session import Session
    from mlx_gptoss.errors import GptOssError
    from mlx_gptoss.harmony import Done, ReasoningDelta, Reply, TextDelta, ToolCall, ToolCallDelta
    from mlx_gptoss.llm import Engine, load
    from mlx_gptoss.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Done",
    "Engine",
    "GptOssError",
    "ReasoningDelta",
    "Reply",
    "SamplingParams",
    "Session",
    "TextDelta",
    "ToolCall",
    "ToolCallDelta",
    "load",
]

_HOME = {
    "Done": "harmony",
    "Engine": "llm",
    "GptOssError": "errors",
    "ReasoningDelta": "harmony",
    "Reply": "harmony",
    "SamplingParams": "sampling",
    "Session": "chat.session",
    "TextDelta": "harmony",
    "ToolCall": "harmony",
    "ToolCallDelta": "harmony",
    "load": "llm",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
