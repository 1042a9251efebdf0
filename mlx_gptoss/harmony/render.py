"""Conversations to prompts: the token ids equal those of openai-harmony 0.0.8.

A prompt is a list of pieces, each either text or one special token. Text is encoded piece by piece and as
ordinary text, so that nothing a user, a tool or a schema says can become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mlx_gptoss.errors import RequestError, SchemaError
from mlx_gptoss.harmony.json_text import lines
from mlx_gptoss.harmony.types import (
    CHANNELS,
    FUNCTIONS,
    Conversation,
    Message,
    Tool,
    ToolNamespace,
    resolve_results,
)
from mlx_gptoss.harmony.typescript import TypeWriter

if TYPE_CHECKING:
    from mlx_gptoss.tokenizer import Special, Tokenizer

_CONSTRAIN = "<|constrain|>"
# What parts the words of a header; other white space is part of a word.
_HEADER_SPACE = re.compile(r"[ \t\n\r\f]")
_CALLS_GO_TO = "Calls to these tools must go to the commentary channel: 'functions'."


class _Sink(Protocol):
    """Where pieces go."""

    def text(self, text: str) -> None: ...

    def special(self, name: str) -> None: ...

    def sampled(self, token_ids: Sequence[int]) -> bool:
        """Take the tokens of a message as they were sampled; False where they cannot be used."""
        ...


class _Ids:
    """Collects token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []

    def text(self, text: str) -> None:
        if not text:
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text holds half a surrogate pair ({text[error.start]!r} at character {error.start}): "
                "it was decoded wrongly; expected Unicode text"
            ) from None
        self.ids += self.tokenizer.encode(text)

    def special(self, name: str) -> None:
        self.ids.append(getattr(self.tokenizer.special, name))

    def sampled(self, token_ids: Sequence[int]) -> bool:
        special = self.tokenizer.special
        if not is_replayable(token_ids, special):
            return False
        self.ids += token_ids
        if token_ids[-1] == special.return_:
            # <|return|> is only ever sampled: history ends its messages with <|end|>.
            self.ids[-1] = special.end
        elif token_ids[-1] not in (special.end, special.call):
            self.ids.append(special.end)
        return True


class _Text:
    """Collects the prompt as text, special tokens spelled out and sampled messages written anew."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, text: str) -> None:
        self.parts.append(text)

    def special(self, name: str) -> None:
        self.parts.append(f"<|{name.rstrip('_')}|>")

    def sampled(self, token_ids: Sequence[int]) -> bool:
        return False


def is_replayable(token_ids: Sequence[int], special: Special) -> bool:
    """True for the tokens of one well-formed message: header, one `<|message|>`, content, at most one end.

    Tokens of a malformed message would teach the model to write more of them: those are rendered anew.
    """
    ends = (special.end, special.call, special.return_)
    body = token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids
    if body.count(special.message) != 1:
        return False
    content = body[body.index(special.message) + 1 :]
    if special.channel in content or special.constrain in content:
        return False
    return not any(t in (*ends, special.start, special.endoftext, special.startoftext) for t in body)


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    for_completion: bool = True,
    drop_analysis: bool = True,
) -> list[int]:
    """The prompt's token ids. With `for_completion` they end in `<|start|>assistant`.

    `drop_analysis` applies the rule that once the assistant has answered, the reasoning before its first
    answer is left out; while it is still calling tools, reasoning stays.

    Raises RequestError or ToolError for a conversation that does not hold together.
    """
    sink = _Ids(tokenizer)
    _conversation(conversation, sink, for_completion, drop_analysis)
    return sink.ids


def render_for_training(
    conversation: Conversation, tokenizer: Tokenizer, *, drop_analysis: bool = True
) -> list[int]:
    """The token ids to train on: a final answer at the end closes with `<|return|>` in place of `<|end|>`."""
    ids = render(conversation, tokenizer, for_completion=False, drop_analysis=drop_analysis)
    messages = conversation.messages
    if messages and messages[-1].role == "assistant" and messages[-1].channel == "final":
        ids[-1] = tokenizer.special.return_
    return ids


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """The token ids of one message, from `<|start|>` to its end token."""
    sink = _Ids(tokenizer)
    _message(message, message.name, sink)
    return sink.ids


def render_text(
    conversation: Conversation, *, for_completion: bool = True, drop_analysis: bool = True
) -> str:
    """The prompt as text with special tokens spelled out: to look at, not to encode."""
    sink = _Text()
    _conversation(conversation, sink, for_completion, drop_analysis)
    return "".join(sink.parts)


def _conversation(conversation: Conversation, sink: _Sink, for_completion: bool, drop_analysis: bool) -> None:
    conversation.validate()
    _message(Message("system", system_text(conversation)), None, sink)
    if developer := developer_text(conversation):
        _message(Message("developer", developer), None, sink)
    messages = conversation.messages
    dropped = _dropped(messages) if drop_analysis else 0
    for index, (message, name) in enumerate(resolve_results(messages)):
        if index >= dropped or message.channel != "analysis":
            _message(message, name, sink)
    if for_completion:
        sink.special("start")
        sink.text("assistant")


def _dropped(messages: Sequence[Message]) -> int:
    """How many messages from the start lose their analysis: those before the first final message, once the
    assistant's latest message is a final one."""
    latest = next((m for m in reversed(messages) if m.role == "assistant"), None)
    if latest is None or latest.channel != "final":
        return 0
    return next(i for i, m in enumerate(messages) if m.channel == "final")


def system_text(conversation: Conversation) -> str:
    """The content of the system message."""
    c = conversation
    top = [c.identity] if c.identity is not None else []
    if c.knowledge_cutoff is not None:
        top.append(f"Knowledge cutoff: {c.knowledge_cutoff}")
    if c.current_date is not None:
        top.append(f"Current date: {c.current_date}")
    sections = ["\n".join(top)] if top else []
    if c.reasoning_effort is not None:
        sections.append(f"Reasoning: {c.reasoning_effort}")
    if c.builtin:
        sections.append(tools_text(c.builtin))
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    sections.append(f"{channels}\n{_CALLS_GO_TO}" if c.tools else channels)
    return "\n\n".join(sections)


def developer_text(conversation: Conversation) -> str:
    """The content of the developer message, "" where there is nothing to say."""
    c = conversation
    sections = [] if c.instructions is None else ["# Instructions", c.instructions]
    if c.tools:
        sections.append(f"# Tools\n\n{_namespace(FUNCTIONS, '', c.tools)}")
    if c.response_schema is not None:
        try:
            schema = json.dumps(c.response_schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise SchemaError(
                f"the response schema is not JSON ({error}): use JSON values only", "response_schema"
            ) from None
        sections.append(f"# Response Formats\n\n## {c.response_name}\n\n{schema}")
    return "\n\n".join(sections)


def tools_text(namespaces: Sequence[ToolNamespace]) -> str:
    """The "# Tools" section of these namespaces, in the order of their names."""
    ordered = sorted(namespaces, key=lambda n: n.name)
    return "\n\n".join(["# Tools", *(_namespace(n.name, n.description, n.tools) for n in ordered)])


def _namespace(name: str, description: str, tools: Sequence[Tool]) -> str:
    out = [f"## {name}\n"]
    out += [f"// {line}" if tools else line for line in lines(description)]
    if tools:
        out.append(f"namespace {name} {{\n")
        writer = TypeWriter(tool.name for tool in tools)
        for tool in tools:
            out += _tool(tool, writer)
        out.append(f"}} // namespace {name}")
    return "\n".join(out)


def _tool(tool: Tool, writer: TypeWriter) -> Iterator[str]:
    declarations, arguments = writer.write(tool.parameters) if tool.parameters is not None else ([], "")
    yield from declarations
    for line in lines(tool.description):
        yield f"// {line}"
    yield f"type {tool.name} = ({f'_: {arguments}' if tool.parameters is not None else ''}) => any;\n"


def _message(message: Message, name: str | None, sink: _Sink) -> None:
    sink.special("start")
    sink.text(_word(name or "", "name") if message.role == "tool" else message.role)
    if message.role == "assistant" and message.token_ids is not None and sink.sampled(message.token_ids):
        return
    _header(name, message, sink)
    sink.special("message")
    sink.text(message.content)
    sink.special("call" if message.role == "assistant" and message.recipient is not None else "end")


def _header(name: str | None, message: Message, sink: _Sink) -> None:
    """The rest of a header, after the role."""
    if name is not None and message.role != "tool":
        sink.text(f":{_word(name, 'name')}")
    if message.recipient is not None and message.recipient != "all":
        sink.text(f" to={_word(message.recipient, 'recipient')}")
    if message.channel is not None:
        sink.special("channel")
        sink.text(_word(message.channel, "channel"))
    if message.content_type is not None:
        content_type = _word(message.content_type, "content_type")
        if content_type.startswith(_CONSTRAIN):
            sink.text(" ")
            sink.special("constrain")
            sink.text(content_type.removeprefix(_CONSTRAIN))
        else:
            sink.text(f" {content_type}")


def _word(value: str, field: str) -> str:
    """`value`, when it is one word: white space would start another field of the header."""
    if not value or _HEADER_SPACE.search(value):
        raise RequestError(f"{field} {value!r}: expected one word without white space", field)
    return value
