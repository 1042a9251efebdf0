"""gpt-oss on Apple Silicon through MLX.

    import mlx_gptoss as gptoss

    llm = gptoss.load("openai/gpt-oss-20b")
    print(llm.respond("Why is the sky blue?").text)

The public names are those of `__all__`; each is imported at first use, so that importing the
package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mlx_gptoss.command_buffers import raise_limits

if TYPE_CHECKING:
    from mlx_gptoss.chat.session import (
        Session,
    )
    from mlx_gptoss.errors import (
        BatchError,
        BusyError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        ConversionError,
        GptOssError,
        HostError,
        HubError,
        MemoryLimitError,
        ModelNotFoundError,
        RequestError,
        SchemaError,
        TokenizerError,
        ToolError,
        VerificationError,
    )
    from mlx_gptoss.harmony import (
        Conversation,
        Diagnostic,
        Done,
        Event,
        Message,
        MessageDone,
        PreambleDelta,
        ReasoningDelta,
        Reply,
        TextDelta,
        Tool,
        ToolCall,
        ToolCallDelta,
        Usage,
    )
    from mlx_gptoss.llm import (
        LLM,
        load,
    )
    from mlx_gptoss.mcp.tools import (
        McpTools,
        mcp_tools,
    )
    from mlx_gptoss.sampling import (
        PromptProgress,
        SamplingParams,
        TokenLogprobs,
    )

__all__ = [
    "LLM",
    "BatchError",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "Conversation",
    "ConversionError",
    "Diagnostic",
    "Done",
    "Event",
    "GptOssError",
    "HostError",
    "HubError",
    "McpTools",
    "MemoryLimitError",
    "Message",
    "MessageDone",
    "ModelNotFoundError",
    "PreambleDelta",
    "PromptProgress",
    "ReasoningDelta",
    "Reply",
    "RequestError",
    "SamplingParams",
    "SchemaError",
    "Session",
    "TextDelta",
    "TokenLogprobs",
    "TokenizerError",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolError",
    "Usage",
    "VerificationError",
    "load",
    "mcp_tools",
]

# Every module of the package is imported after this line, so whichever imports MLX finds them raised.
raise_limits()

_LAZY = {
    "chat.session": "Session",
    "errors": "BatchError BusyError CheckpointError ConfigError ContextLengthError ConversionError "
    "GptOssError HostError HubError MemoryLimitError ModelNotFoundError RequestError SchemaError "
    "TokenizerError ToolError VerificationError",
    "harmony": "Conversation Diagnostic Done Event Message MessageDone PreambleDelta ReasoningDelta Reply "
    "TextDelta Tool ToolCall ToolCallDelta Usage",
    "llm": "LLM load",
    "mcp.tools": "McpTools mcp_tools",
    "sampling": "PromptProgress SamplingParams TokenLogprobs",
}
_HOME = {name: home for home, names in _LAZY.items() for name in names.split()}


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version

        value = version("gptoss-mlx")
    elif name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
