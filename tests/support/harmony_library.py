"""openai-harmony as an oracle: our conversations in its types, its messages in ours."""

from __future__ import annotations

from functools import cache
from typing import Any

import openai_harmony as library

from mlx_gptoss.harmony import Conversation, Message, Tool


@cache
def encoding() -> library.HarmonyEncoding:
    """The library's encoding; `real_vocabulary.require_tokenizer` has told it where the ranks are."""
    return library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)


def to_library(conversation: Conversation) -> library.Conversation:
    """The same conversation for the library: fields become its system and developer messages."""
    c = conversation
    effort = library.ReasoningEffort(c.reasoning_effort.capitalize()) if c.reasoning_effort else None
    system = library.SystemContent(
        model_identity=c.identity,
        reasoning_effort=effort,
        conversation_start_date=c.current_date,
        knowledge_cutoff=c.knowledge_cutoff,
    )
    for namespace in c.builtin:
        described = [describe(tool) for tool in namespace.tools]
        system.with_tools(
            library.ToolNamespaceConfig(
                name=namespace.name, description=namespace.description, tools=described
            )
        )
    messages = [library.Message.from_role_and_content(library.Role.SYSTEM, system)]
    if c.instructions is not None or c.tools:
        developer = library.DeveloperContent(instructions=c.instructions)
        if c.tools:
            developer.with_function_tools([describe(tool) for tool in c.tools])
        messages.append(library.Message.from_role_and_content(library.Role.DEVELOPER, developer))
    recipients = {m.call_id: m.recipient for m in c.messages if m.role == "assistant"}
    for m in c.messages:
        name = recipients.get(m.call_id) if m.role == "tool" and m.name is None else m.name
        author = library.Author(role=library.Role(m.role), name=name)
        message = library.Message.from_author_and_content(author, m.content)
        message.channel, message.recipient, message.content_type = m.channel, m.recipient, m.content_type
        messages.append(message)
    return library.Conversation.from_messages(messages)


def describe(tool: Tool) -> library.ToolDescription:
    """A tool for the library."""
    return library.ToolDescription(name=tool.name, description=tool.description, parameters=tool.parameters)


def fields(message: Message | library.Message) -> tuple[Any, ...]:
    """What both sides say of a message."""
    if isinstance(message, Message):
        m = message
        return m.role, m.name, m.recipient, m.channel, m.content_type, m.content
    author = message.author
    content = "".join(part.text for part in message.content)
    return (
        author.role.value,
        author.name,
        message.recipient,
        message.channel,
        message.content_type,
        content,
    )
