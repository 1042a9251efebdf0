"""The assistant's turns as every API hands them over, and digests of conversations, to recognise them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from mlx_gptoss.harmony import Conversation, Message


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
