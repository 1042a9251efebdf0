"""What a conversation is made of: messages, tools, and the fields of the system and developer messages.

Everything here is checked when it is made, so that a wrong tool or role is reported where it was written
and not when the prompt is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args

from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.harmony.typescript import check_parameters

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)

ReasoningEffort = Literal["low", "medium", "high"]
EFFORTS: tuple[str, ...] = get_args(ReasoningEffort)

CHANNELS = ("analysis", "commentary", "final")
FUNCTIONS = "functions"
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
CONSTRAIN = "<|constrain|>"
JSON_ARGUMENTS = f"{CONSTRAIN}json"

# A name stands in a message's header, where white space and angle brackets end a word.
_NAME = re.compile(r"[\w./:-]+")


@dataclass(frozen=True)
class Message:
    """One message.

    `recipient` is the tool a call goes to ("functions.get_weather", "python"), or "assistant" on a tool's
    result. `name` is the tool's full name on a result, and an optional author's name elsewhere. `call_id`
    ties a result to its call; it is never shown to the model. `content_type` is what follows the channel in
    the header, such as "<|constrain|>json".

    `token_ids` are the sampled tokens of an assistant message, from the one after `<|start|>assistant` up to
    and including its end token. The renderer then emits them as they are, so that a KV cache of the
    conversation stays valid; leave them out when a message is edited.
    """

    role: Role
    content: str
    channel: str | None = None
    recipient: str | None = None
    name: str | None = None
    content_type: str | None = None
    call_id: str | None = None
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError(f"role {self.role!r}: expected one of {', '.join(ROLES)}", "role")
        check_type(self.content, str, "content", "text; join the parts to one string")
        if self.role == "tool" and not self.name and not self.call_id:
            raise ToolError(
                "a tool message without a name: give name= (such as 'functions.get_weather') or call_id=",
                "name",
            )

    @classmethod
    def user(cls, text: str) -> Message:
        """What the user says."""
        return cls("user", text)

    @classmethod
    def assistant(cls, text: str) -> Message:
        """An answer to the user, on the final channel."""
        return cls("assistant", text, channel="final")

    @classmethod
    def reasoning(cls, text: str) -> Message:
        """A piece of reasoning, on the analysis channel."""
        return cls("assistant", text, channel="analysis")

    @classmethod
    def preamble(cls, text: str) -> Message:
        """What the assistant tells the user before it calls tools: commentary without a recipient."""
        return cls("assistant", text, channel="commentary")

    @classmethod
    def tool_call(cls, name: str, arguments: str, call_id: str | None = None) -> Message:
        """A call of the function `name` (with or without "functions.") with JSON arguments."""
        recipient = name if name.startswith(FUNCTIONS + ".") else f"{FUNCTIONS}.{name}"
        return cls("assistant", arguments, "commentary", recipient, None, JSON_ARGUMENTS, call_id)

    @classmethod
    def tool_result(
        cls, content: str, *, name: str | None = None, call_id: str | None = None, channel: str = "commentary"
    ) -> Message:
        """A tool's result. `name` is the full name; with only `call_id` it is taken from the call."""
        return cls("tool", content, channel, "assistant", name, None, call_id)


@dataclass(frozen=True)
class Tool:
    """A function the model may call. `parameters` is a JSON schema of its arguments, None for no arguments.

    strict: False lets the arguments be any JSON object where the schema cannot be enforced.

    Raises ToolError for a missing or unusable name and SchemaError for a schema that cannot be shown.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        check_name(self.name, "a tool", "tools.name")
        if not isinstance(self.description, str):
            raise ToolError(
                f"tool {self.name!r}: the description is a {type(self.description).__name__}: expected text",
                "tools.description",
            )
        if self.parameters is not None:
            check_parameters(self.parameters, f"tool {self.name!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tool:
        """From {"name", "description", "parameters"}, or OpenAI's {"type": "function", "function": {…}}."""
        inner = data.get("function", data) if isinstance(data, Mapping) else None
        if not isinstance(inner, Mapping) or data.get("type", "function") != "function":
            raise ToolError(
                f"{data!r}: expected a function tool, {{'name': …, 'description': …, 'parameters': …}}",
                "tools",
            )
        return cls(inner.get("name") or "", inner.get("description") or "", inner.get("parameters"))


@dataclass(frozen=True)
class ToolNamespace:
    """A group of built-in tools, shown in the system message. Without tools the description says it all."""

    name: str
    description: str = ""
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name, "a namespace of tools", "builtin.name")
        if self.name == FUNCTIONS:
            raise ToolError(
                "'functions' is the namespace of function tools: give them as tools=", "builtin.name"
            )
        check_unique(self.tools, f"namespace {self.name!r}")


@dataclass
class Conversation:
    """Everything a prompt is rendered from.

    The system message is made of `identity`, `knowledge_cutoff`, `current_date`, `reasoning_effort` (each
    left out when None) and the `builtin` namespaces; the developer message of `instructions`, `tools` and
    `response_schema`. Both precede `messages`.

    Raises RequestError, ToolError or SchemaError, naming the field.
    """

    messages: list[Message]
    instructions: str | None = None
    tools: list[Tool] = field(default_factory=list)
    builtin: list[ToolNamespace] = field(default_factory=list)
    reasoning_effort: ReasoningEffort | None = "medium"
    response_schema: dict[str, Any] | None = None
    response_name: str = "response"
    current_date: str | None = None
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF
    identity: str | None = IDENTITY

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check what spans several fields. The renderer calls this again, for lists that have grown."""
        if self.reasoning_effort is not None and self.reasoning_effort not in EFFORTS:
            raise RequestError(
                f"reasoning effort {self.reasoning_effort!r}: expected one of {', '.join(EFFORTS)}",
                "reasoning_effort",
            )
        for name in ("instructions", "current_date", "knowledge_cutoff", "identity"):
            check_type(getattr(self, name), str | None, name, "text, or None")
        check_type(self.response_name, str, "response_name", "text")
        check_unique(self.tools, "tools")
        check_unique(self.builtin, "builtin")
        check_type(self.response_schema, dict | bool | None, "response_schema", "a JSON schema")
        for index, message in enumerate(self.messages):
            check_type(message, Message, f"messages[{index}]", "a harmony Message")
        list(resolve_results(self.messages))  # raises


def resolve_results(messages: Sequence[Message]) -> Iterator[tuple[Message, str | None]]:
    """Each message with the author's name to show; a tool's result must answer an earlier call.

    Raises ToolError for a result whose call (by `call_id`, else by name) is not there.
    """
    by_id: dict[str, str] = {}  # a call's id, or the function's bare name, -> its recipient
    by_name: dict[str, str] = {}
    for index, message in enumerate(messages):
        name = message.name
        if message.role == "assistant" and message.recipient is not None:
            by_name[message.recipient.removeprefix(f"{FUNCTIONS}.")] = message.recipient
            if message.call_id is not None:
                by_id[message.call_id] = message.recipient
        elif message.role == "tool":
            if message.call_id is not None:
                what, recipient = f"call id {message.call_id!r}", by_id.get(message.call_id)
            else:
                bare = (name or "").removeprefix(f"{FUNCTIONS}.")
                what, recipient = f"a call of {name!r}", by_name.get(bare)
            if recipient is None:
                raise ToolError(
                    f"messages[{index}] is the result of {what}, which no earlier assistant message holds: "
                    "keep the call in the history, before its result",
                    f"messages[{index}]",
                )
            name = name or recipient
        yield message, name


def check_type(value: object, kind: type | UnionType, field: str, expected: str) -> None:
    """Raise RequestError, naming the field, unless `value` is of a kind."""
    if not isinstance(value, kind):
        raise RequestError(f"{field} is a {type(value).__name__}: expected {expected}", field)


def check_name(name: object, what: str, where: str) -> None:
    """Raise ToolError unless `name` can stand in a message's header."""
    if not isinstance(name, str) or not name:
        raise ToolError(f"{what} has no name: give it one, such as 'get_weather'", where)
    if not _NAME.fullmatch(name):
        raise ToolError(
            f"{what} is named {name!r}: expected letters, digits and any of _ - . / : without spaces", where
        )


def check_unique(items: Sequence[Tool | ToolNamespace], where: str) -> None:
    """Raise ToolError when two items share a name."""
    seen: set[str] = set()
    for item in items:
        if not isinstance(item, Tool | ToolNamespace):
            raise ToolError(f"{where}: {item!r} is not a Tool: make one with Tool(…)", "tools")
        if item.name in seen:
            raise ToolError(f"{where}: {item.name!r} is declared twice: rename or drop one", "tools")
        seen.add(item.name)
