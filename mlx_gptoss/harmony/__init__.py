"""The chat format of gpt-oss: conversations to token ids, token ids to typed events.

`render` writes prompts whose tokens equal those of openai-harmony; `StreamParser` reads what the model
samples, whatever it samples, without failing and without losing a character.
"""

from mlx_gptoss.harmony.events import (
    Diagnostic,
    Done,
    Event,
    FinishReason,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    Reply,
    ReplyBuilder,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mlx_gptoss.harmony.namespaces import BROWSER, PYTHON
from mlx_gptoss.harmony.parser import DIAGNOSTICS, StreamParser
from mlx_gptoss.harmony.render import render, render_for_training, render_message, render_text
from mlx_gptoss.harmony.types import Conversation, Message, ReasoningEffort, Role, Tool, ToolNamespace

__all__ = [
    "BROWSER",
    "DIAGNOSTICS",
    "PYTHON",
    "Conversation",
    "Diagnostic",
    "Done",
    "Event",
    "FinishReason",
    "Message",
    "MessageDone",
    "PreambleDelta",
    "ReasoningDelta",
    "ReasoningEffort",
    "Reply",
    "ReplyBuilder",
    "Role",
    "StreamParser",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolNamespace",
    "Usage",
    "render",
    "render_for_training",
    "render_message",
    "render_text",
]
