"""The turn that a request asks for: what each API reads in its own way, collected to one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from mlx_gptoss.chat.turn import TurnOptions
from mlx_gptoss.errors import RequestError, ToolError
from mlx_gptoss.grammar import ResponseFormat, ToolChoice
from mlx_gptoss.harmony import Conversation, Message, ReasoningEffort, Tool, ToolNamespace
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.settings import ServerSettings
from mlx_gptoss.server.translate.conversation import AssistantTurn, after, opening
from mlx_gptoss.server.translate.options import at_most, check_schema_size, choose_tools, function_tool

# Finds the sampled messages of a turn that follows a history (its digest), if they are known.
Recall = Callable[[AssistantTurn, bytes], list[Message] | None]
# A declared function, {"name", "description", "parameters"}; where it is declared, and where its schema is.
Declaration = tuple[Mapping[str, Any], str, str]
Declared = TypeVar("Declared")


@dataclass(frozen=True)
class TurnRequest:
    """A request, translated.

    names: what the model may find wrong, by its own name -> the field that the client sent. strict: False
    lets the answer be any JSON object where its schema cannot be enforced. preface: the instructions that
    came as messages before the first turn. approved: ids of calls at the conversation's end that the server
    may run, where it has the tool.
    """

    conversation: Conversation
    options: TurnOptions
    names: Mapping[str, str]
    strict: bool
    preface: tuple[str, ...]
    approved: frozenset[str] = frozenset()
    model: str | None = None  # as the client calls it


@dataclass
class TurnBuilder:
    """Collects what a request says, its turns in their order. Errors name the field that they are given.

    messages, preface: at first those of an earlier request, to go on from; preface are the instructions that
    came as messages before the first turn. today: the date for the system message. progress: see
    TurnOptions. model: as the client calls it.
    """

    settings: ServerSettings
    recall: Recall
    today: str
    messages: list[Message | AssistantTurn]
    preface: list[str]
    effort: ReasoningEffort = "medium"
    progress: bool = False
    approved: set[str] = field(default_factory=set)
    model: str | None = None
    _tools: list[Tool] = field(default_factory=list)
    _builtin: list[ToolNamespace] = field(default_factory=list)
    _choice: ToolChoice = "auto"
    _format: ResponseFormat | None = None
    _format_name: str | None = None
    _strict: bool = True
    _names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before = [m for m in self.messages if isinstance(m, Message) and m.call_id]
        self._calls = {m.call_id for m in before if m.role == "assistant"}
        answered = {m.call_id for m in before if m.role == "tool"}
        self._open = {
            m.call_id: (m.recipient or "").removeprefix("functions.")
            for m in before
            if m.role == "assistant" and m.call_id is not None and m.call_id not in answered
        }

    def instructions(self, text: str) -> None:
        """A system or developer message: before the first turn part of the instructions, else a turn."""
        if text and self.messages:
            self.messages.append(Message("developer", text))
        elif text:
            self.preface.append(text)

    def user(self, text: str) -> None:
        """What the user says."""
        self.messages.append(Message.user(text))

    def assistant(self, turn: AssistantTurn) -> None:
        """A turn as the client sends it back. Text beside calls came before them and is not the answer."""
        if turn.calls and turn.text:
            turn = replace(turn, preamble=turn.preamble + turn.text, text="")
        if turn:
            self.messages.append(turn)
            self._calls.update(call.call_id for call in turn.calls)
            self._open |= {call.call_id: call.name for call in turn.calls}

    def tool_result(self, call_id: str | None, output: str, field: str) -> None:
        """The result of an earlier call."""
        if not call_id or call_id not in self._calls:
            raise ToolError(
                f"{field}: the call id {call_id!r} belongs to no earlier call in this conversation: "
                "send the assistant message with the call before its result",
                field,
            )
        self.messages.append(Message.tool_result(output, call_id=call_id))
        self._open.pop(call_id, None)

    def is_open(self, call_id: str) -> bool:
        """Whether an earlier call has no result yet."""
        return call_id in self._open

    def open_call(self, call_id: str, field: str) -> str:
        """The name of an earlier call that has no result yet. Raises ToolError."""
        if call_id not in self._open:
            raise ToolError(f"{field}: no call of this conversation waits for {call_id[:80]!r}", field)
        return self._open[call_id]

    def tools(
        self,
        declared: Sequence[Declared] | None,
        read: Callable[[Declared, str], Declaration | None],
        choice: str | dict[str, Any] | None,
        served: Sequence[Tool | ToolNamespace] = (),
    ) -> None:
        """The declared tools and the choice among them. Where `read` gives None, the tool is not offered.

        served: what the server itself runs; it stands after the declared ones.
        """
        at_most(self.settings.max_tools, len(declared or ()), "tools", "tools", ToolError)
        tools, schema_fields = [], {}
        for index, one in enumerate(declared or ()):
            if (found := read(one, f"tools[{index}]")) is not None:
                function, where, schema_field = found
                tools.append(function_tool(function, self.settings, where, schema_field))
                schema_fields[tools[-1].name] = schema_field
        self._builtin = [tool for tool in served if isinstance(tool, ToolNamespace)]
        for tool in tools:
            if tool.name in (namespace.name for namespace in self._builtin):
                raise ToolError(f"tools: {tool.name!r} is a tool of this server: rename or drop one", "tools")
        tools += [tool for tool in served if isinstance(tool, Tool)]
        self._tools, self._choice = choose_tools(choice, tools)
        for index, tool in enumerate(self._tools):
            self._names[f"tools[{index}].parameters"] = schema_fields.get(tool.name, "tools")

    def answer_format(
        self,
        kind: Literal["text", "json_object", "json_schema"],
        where: str,
        schema: object = None,
        name: str | None = None,
        strict: bool | None = True,
        nested: bool = True,
    ) -> None:
        """What the answer has to be: OpenAI's name for it, and where the request says so.

        nested: the schema stands there under `schema`; else `where` is the schema itself.
        """
        if kind == "json_object":
            self._format = ResponseFormat("json_object", True)
        elif kind == "json_schema":
            field = f"{where}.schema" if nested else where
            if schema is None:
                raise RequestError(f"{field} is missing: give a JSON schema", field)
            check_schema_size(schema, self.settings, field)
            self._format, self._format_name = ResponseFormat("schema", schema), name
            self._names["schema"], self._strict = field, strict is True

    def answer_grammar(self, kind: Literal["regex", "lark", "choices"], value: object, where: str) -> None:
        """That the answer has to match a regular expression or a Lark grammar, or be one of some texts."""
        check_schema_size(value, self.settings, where)
        self._format = ResponseFormat(kind, value)
        self._names[kind] = where

    def conversation(self, instructions: str | None = None) -> Conversation:
        """The conversation of all that was collected. `instructions` go before the collected ones.

        The assistant's turns have their sampled tokens where they are remembered unchanged.
        """
        shape = self._format
        conversation = Conversation(
            messages=[],
            instructions="\n\n".join([instructions, *self.preface] if instructions else self.preface) or None,
            tools=self._tools,
            builtin=self._builtin,
            reasoning_effort=self.effort,
            response_schema=shape.value if shape is not None and shape.kind == "schema" else None,
            response_name=self._format_name or "response",
            current_date=self.today,
        )
        history = opening(conversation)
        for entry in self.messages:
            if isinstance(entry, AssistantTurn):
                added = self.recall(entry, history) or entry.messages()
            else:
                added = [entry]
            conversation.messages += added
            history = after(history, added)
        namespaces = {namespace.name for namespace in self._builtin}
        conversation.messages = [_to_builtin(message, namespaces) for message in conversation.messages]
        return conversation

    def build(
        self,
        params: SamplingParams,
        names: Mapping[str, str],
        *,
        instructions: str | None = None,
        reasoning_budget: int | None = None,
    ) -> TurnRequest:
        """The turn that follows the conversation; names: see TurnRequest."""
        conversation = self.conversation(instructions)
        options = TurnOptions(params, self._format, self._choice, False, reasoning_budget, self.progress)
        named = {**self._names, **names}
        preface, approved = tuple(self.preface), frozenset(self.approved)
        return TurnRequest(conversation, options, named, self._strict, preface, approved, self.model)


def _to_builtin(message: Message, namespaces: set[str]) -> Message:
    """A call that came back as one of a function, as the one of a built-in tool that it was."""
    name = (message.recipient or "").removeprefix("functions.")
    if message.role == "assistant" and name != message.recipient and name.split(".")[0] in namespaces:
        return replace(message, recipient=name, channel="analysis", content_type="code", token_ids=None)
    return message
