"""What comes out of a generation: typed events, and the reply they add up to.

A stream is a series of these events and ends with `Done`. The text of one kind of delta, joined, is the text
of the messages of that kind; nothing is repeated and nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from mlx_gptoss.harmony.types import Message
from mlx_gptoss.sampling import PromptProgress, TokenLogprobs

if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultTypeVar

    Parsed = DefaultTypeVar("Parsed", default=Any)
else:
    Parsed = TypeVar("Parsed")

SHOWN = 60  # characters of an answer in a reply's repr
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning (the analysis channel). Not meant for end users as it is."""

    text: str


@dataclass(frozen=True)
class TextDelta:
    """More of the answer. `logprobs`: its tokens with their log-probabilities, when they were asked for."""

    text: str
    logprobs: tuple[tuple[int, TokenLogprobs], ...] | None = None


@dataclass(frozen=True)
class PreambleDelta:
    """More of what the assistant tells the user before calling tools (commentary without a recipient)."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call's arguments. A call's first delta has arguments "". `index` counts the calls."""

    index: int
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call. `name` is without "functions."; `recipient` is the name as the model wrote it."""

    index: int
    call_id: str
    name: str
    arguments: str
    recipient: str = ""


@dataclass(frozen=True)
class MessageDone:
    """A message is over, `ended` unless the stream broke off in it. Assistant messages carry the tokens that
    were sampled.
    """

    message: Message
    ended: bool = True


@dataclass(frozen=True)
class Diagnostic:
    """Something the format does not allow, and what was made of it.

    `kind` is one of `DIAGNOSTICS`; `detail` holds the text or markup concerned; `position` is the number of
    tokens that came before it in the stream.
    """

    kind: str
    detail: str
    position: int


@dataclass(frozen=True)
class Usage:
    """Counts of tokens. `cached_tokens` are those of the prompt that needed no prefill."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, repr=False)
class Reply(Generic[Parsed]):
    """What a generation came to. `parsed` is a whole answer as data where a schema was given, `logprobs` the
    answer's tokens (id, log-probabilities) where they were asked for. Notebooks show the text as Markdown.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    messages: tuple[Message, ...]
    finish_reason: FinishReason
    usage: Usage
    diagnostics: tuple[Diagnostic, ...] = ()
    parsed: Parsed | None = None
    stop_text: str | None = None  # the stop text that ended it
    logprobs: tuple[tuple[int, TokenLogprobs], ...] | None = None

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}…"
        called = [call.name for call in self.tool_calls]
        more = f", tool_calls={called}" if called else ""
        more += "" if self.parsed is None else f", parsed={type(self.parsed).__name__}"
        counts = f"{self.usage.prompt_tokens} + {self.usage.completion_tokens} tokens"
        return f"<Reply {text!r}{more}, {self.finish_reason}, {counts}>"

    def _repr_markdown_(self) -> str:
        """The answer; of a turn without one the calls, and what ended it early."""
        parts = [self.text] if self.parsed is None else [f"```json\n{self.text}\n```"]
        parts += [f"`{call.name}({call.arguments})`" for call in self.tool_calls]
        parts += [f"*({self.finish_reason})*"] if self.finish_reason in ("length", "cancelled") else []
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Done:
    """The end of a stream."""

    finish_reason: FinishReason
    usage: Usage
    reply: Reply


Event = (
    PromptProgress
    | ReasoningDelta
    | TextDelta
    | PreambleDelta
    | ToolCallDelta
    | ToolCall
    | MessageDone
    | Diagnostic
    | Done
)


class ReplyBuilder:
    """Adds events up to a Reply. `text` and `reasoning` are the deltas joined in their order.

    logprobs: whether the reply is to have those of its text.
    """

    def __init__(self, logprobs: bool = False) -> None:
        self._logprobs: list[tuple[int, TokenLogprobs]] | None = [] if logprobs else None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._messages: list[Message] = []
        self._diagnostics: list[Diagnostic] = []
        self.tool_calls: list[ToolCall] = []  # the complete ones so far

    def add(self, events: Sequence[Event]) -> None:
        """Take in the events of one step."""
        for event in events:
            match event:
                case TextDelta():
                    self._text.append(event.text)
                    if self._logprobs is not None:
                        self._logprobs += event.logprobs or ()
                case ReasoningDelta():
                    self._reasoning.append(event.text)
                case ToolCall():
                    self.tool_calls.append(event)
                case MessageDone():
                    self._messages.append(event.message)
                case Diagnostic():
                    self._diagnostics.append(event)

    def build(
        self, finish_reason: FinishReason, usage: Usage, parsed: Any = None, stop_text: str | None = None
    ) -> Reply:
        """The reply of all events so far."""
        return Reply(
            "".join(self._text),
            "".join(self._reasoning),
            tuple(self.tool_calls),
            tuple(self._messages),
            finish_reason,
            usage,
            tuple(self._diagnostics),
            parsed,
            stop_text,
            None if self._logprobs is None else tuple(self._logprobs),
        )
