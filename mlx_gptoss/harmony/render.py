"""Conversations to prompts: the token ids equal those of openai-harmony 0.0.8.

A prompt is a list of pieces, each either text or one special token. Text is encoded piece by piece and as
ordinary text, so that nothing a user, a tool or a schema says can become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mlx_gptoss.errors import ContextLengthError, RequestError, SchemaError
from mlx_gptoss.harmony.json_text import lines
from mlx_gptoss.harmony.types import (
    CHANNELS,
    CONSTRAIN,
    FUNCTIONS,
    Conversation,
    Message,
    Tool,
    ToolNamespace,
    resolve_results,
)
from mlx_gptoss.harmony.typescript import TypeWriter
from mlx_gptoss.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from mlx_gptoss.tokenizer import Special, Tokenizer

# What parts the words of a header; other white space is part of a word.
_HEADER_SPACE = re.compile(r"[ \t\n\r\f]")
_CALLS_GO_TO = "Calls to these tools must go to the commentary channel: 'functions'."


class _Mark(str):
    """A special token, by its field of `Special`."""


_START, _END = _Mark("start"), _Mark("end")
# Sampled token ids are a piece as they are.
_Piece: TypeAlias = str | Sequence[int]


def _encode(pieces: Iterable[_Piece], tokenizer: Tokenizer, limit: int | None = None) -> list[int]:
    ids: list[int] = []
    for piece in pieces:
        if limit is not None:
            beyond = isinstance(piece, str) and tokenizer.count_beyond(piece, max(0, limit - len(ids)))
            if beyond or len(ids) > limit:
                raise ContextLengthError(len(ids) + beyond, limit, at_least=True)
        if isinstance(piece, _Mark):
            ids.append(getattr(tokenizer.special, piece))
        else:
            ids += tokenizer.encode(piece) if isinstance(piece, str) else piece
    return ids


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
    limit: int | None = None,
) -> list[int]:
    """The prompt's token ids. With `for_completion` they end in `<|start|>assistant`.

    limit: what is surely longer is not tokenised to its end; what is a little longer may be returned.

    `drop_analysis` applies the rule that once the assistant has answered, the reasoning before its first
    answer is left out; while it is still calling tools, reasoning stays.

    Raises RequestError or ToolError for a conversation that does not hold together, ContextLengthError for
    one beyond the limit.
    """
    pieces = _conversation(conversation, tokenizer.special, for_completion, drop_analysis)
    return _encode(pieces, tokenizer, limit)


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
    return _encode(_message(message, message.name, tokenizer.special), tokenizer)


def render_text(
    conversation: Conversation, *, for_completion: bool = True, drop_analysis: bool = True
) -> str:
    """The prompt as text with special tokens spelled out: to look at, not to encode."""
    pieces = _conversation(conversation, None, for_completion, drop_analysis)
    return "".join(SPECIAL_TOKENS[p] if isinstance(p, _Mark) else str(p) for p in pieces)


def render_messages(conversation: Conversation, tokenizer: Tokenizer) -> list[tuple[int | None, list[int]]]:
    """The token ids of a conversation with all its reasoning, message by message.

    Each with the message's index in the conversation; the system and developer messages come first, as None.
    """
    special = tokenizer.special
    found: list[tuple[int | None, list[int]]] = [(None, _encode(_preface(conversation, special), tokenizer))]
    for index, pieces in _kept(conversation, special, False):
        found.append((index, _encode(pieces, tokenizer)))
    return found


def _conversation(
    conversation: Conversation, special: Special | None, for_completion: bool, drop_analysis: bool
) -> Iterator[_Piece]:
    """Without `special`, sampled messages are written anew."""
    yield from _preface(conversation, special)
    for _, pieces in _kept(conversation, special, drop_analysis):
        yield from pieces
    if for_completion:
        yield from (_START, "assistant")


def _preface(conversation: Conversation, special: Special | None) -> Iterator[_Piece]:
    """The system message, and the developer message if there is anything to say."""
    conversation.validate()
    yield from _message(Message("system", system_text(conversation)), None, special)
    if developer := developer_text(conversation):
        yield from _message(Message("developer", developer), None, special)


def _kept(
    conversation: Conversation, special: Special | None, drop_analysis: bool
) -> Iterator[tuple[int, Iterator[_Piece]]]:
    """The messages that are shown, by their index."""
    messages = conversation.messages
    dropped = _dropped(messages) if drop_analysis else 0
    for index, (message, name) in enumerate(resolve_results(messages)):
        if index >= dropped or message.channel != "analysis":
            yield index, _message(message, name, special)


def _dropped(messages: Sequence[Message]) -> int:
    """How many messages from the start lose their analysis: those before the first final message, once the
    assistant's latest message is a final one.
    """
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


def _message(message: Message, name: str | None, special: Special | None) -> Iterator[_Piece]:
    sampled, by_assistant = message.token_ids, message.role == "assistant"
    yield _START
    yield _word(name or "", "name") if message.role == "tool" else message.role
    if by_assistant and sampled is not None and special is not None and is_replayable(sampled, special):
        # History ends its messages with <|end|>: <|return|> is only ever sampled.
        yield sampled[:-1] if sampled[-1] in (special.return_, special.end) else sampled
        if sampled[-1] != special.call:
            yield _END
        return
    yield from _header(name, message)
    yield from (_Mark("message"), message.content)
    yield _Mark("call") if by_assistant and message.recipient is not None else _END


def _header(name: str | None, message: Message) -> Iterator[_Piece]:
    """The rest of a header, after the role."""
    if name is not None and message.role != "tool":
        yield f":{_word(name, 'name')}"
    if message.recipient is not None and message.recipient != "all":
        yield f" to={_word(message.recipient, 'recipient')}"
    if message.channel is not None:
        yield from (_Mark("channel"), _word(message.channel, "channel"))
    if message.content_type is not None:
        content_type = _word(message.content_type, "content_type")
        if content_type.startswith(CONSTRAIN):
            yield from (" ", _Mark("constrain"), content_type.removeprefix(CONSTRAIN))
        else:
            yield f" {content_type}"


def _word(value: str, field: str) -> str:
    """`value`, when it is one word: white space would start another field of the header."""
    if not value or _HEADER_SPACE.search(value):
        raise RequestError(f"{field} {value!r}: expected one word without white space", field)
    return value
