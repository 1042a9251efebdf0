"""The turns of a request, as every API hands them over, and the harmony conversation made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from mlx_gptoss.errors import ToolError
from mlx_gptoss.grammar import ResponseFormat
from mlx_gptoss.harmony import Conversation, Message, ReasoningEffort, Tool


@dataclass(frozen=True)
class Call:
    """A function call as a client sends it back. `arguments` is JSON text."""

    call_id: str
    name: str
    arguments: str


@dataclass
class AssistantTurn:
    """What a client says the assistant did in one turn."""

    reasoning: str = ""
    preamble: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.preamble or self.text or self.calls)

    def messages(self) -> list[Message]:
        """The turn in harmony, as it has to be rendered when its tokens are not known."""
        result = []
        if self.reasoning:
            result.append(Message.reasoning(self.reasoning))
        if self.preamble:
            result.append(Message.preamble(self.preamble))
        result += [Message.tool_call(call.name, call.arguments, call.call_id) for call in self.calls]
        if self.text:
            result.append(Message.assistant(self.text))
        return result


# Finds the sampled messages of a turn that follows a history (its digest), if they are known.
Recall = Callable[[AssistantTurn, bytes], list[Message] | None]


def opening(conversation: Conversation) -> bytes:
    """The digest of what stands before a conversation's first message."""
    shown = (conversation.instructions, conversation.tools, conversation.response_schema)
    return hashlib.sha256(repr(shown).encode()).digest()


def after(history: bytes, messages: Iterable[Message]) -> bytes:
    """The digest of a history that goes on with `messages`. Reasoning does not count: clients may drop it."""
    for message in messages:
        if message.channel != "analysis":
            said = json.dumps([message.role, message.channel, message.recipient, message.content])
            history = hashlib.sha256(history + said.encode()).digest()
    return history


def digest(conversation: Conversation) -> bytes:
    """The digest of a whole conversation, under which the turn that follows it is remembered."""
    return after(opening(conversation), conversation.messages)


class ConversationBuilder:
    """Collects the turns of a request in order. Errors name the field that they are given."""

    def __init__(self, recall: Recall, history: Sequence[Message] = (), preface: Sequence[str] = ()) -> None:
        """history, preface: messages and leading instructions of an earlier request, to go on from."""
        self._recall = recall
        self._calls = {m.call_id for m in history if m.role == "assistant"}
        self.preface = list(preface)
        self.messages: list[Message | AssistantTurn] = list(history)

    def instructions(self, text: str) -> None:
        """A system or developer message: before the first turn part of the instructions, else a turn."""
        if not text:
            return
        if self.messages:
            self.messages.append(Message("developer", text))
        else:
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

    def tool_result(self, call_id: str | None, output: str, field: str) -> None:
        """The result of an earlier call."""
        if not call_id or call_id not in self._calls:
            raise ToolError(
                f"{field}: the call id {call_id!r} belongs to no earlier call in this conversation: "
                "send the assistant message with the call before its result",
                field,
            )
        self.messages.append(Message.tool_result(output, call_id=call_id))

    def build(
        self,
        *,
        today: str,
        tools: Iterable[Tool],
        effort: ReasoningEffort,
        response_format: ResponseFormat | None,
        response_name: str | None = None,
        instructions: str | None = None,
    ) -> Conversation:
        """The harmony conversation of all that was collected. `instructions` go before the collected ones.

        The assistant's turns have their sampled tokens where they are remembered unchanged.
        """
        parts = [instructions, *self.preface] if instructions else self.preface
        schema = response_format.value if response_format and response_format.kind == "schema" else None
        conversation = Conversation(
            messages=[],
            instructions="\n\n".join(parts) or None,
            tools=list(tools),
            reasoning_effort=effort,
            response_schema=schema,
            response_name=response_name or "response",
            current_date=today,
        )
        history = opening(conversation)
        for entry in self.messages:
            added = [entry] if isinstance(entry, Message) else self._sampled(entry, history)
            conversation.messages += added
            history = after(history, added)
        return conversation

    def _sampled(self, turn: AssistantTurn, history: bytes) -> list[Message]:
        recalled = self._recall(turn, history)
        return turn.messages() if recalled is None else recalled
