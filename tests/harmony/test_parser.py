"""The streaming parser: well-formed streams, malformed ones as seen in the wild, and the library's view."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from mlx_gptoss.harmony import (
    DIAGNOSTICS,
    Conversation,
    Diagnostic,
    Event,
    Message,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    ReplyBuilder,
    StreamParser,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
    render,
)
from mlx_gptoss.tokenizer import Tokenizer
from tests.support import fuzz_harmony, harmony_corpus
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.real_vocabulary import require_tokenizer

MARKUP = re.compile(r"(<\|(?:start|end|message|channel|constrain|call|return|endoftext|startoftext)\|>)")
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Zürich"}<|call|>'


class Stream:
    """What became of a stream, given as text with its markup spelled out."""

    def __init__(self, tokenizer: Tokenizer, text: str | list[int], *, from_start: bool = False) -> None:
        ids = self.encode(tokenizer, text) if isinstance(text, str) else text
        count = itertools.count(1)
        parser = StreamParser(tokenizer, call_id_factory=lambda: f"call_{next(count)}", from_start=from_start)
        self.steps = [parser.push(token) for token in ids] + [parser.finish()]
        self.ids = ids
        self.events: list[Event] = [event for step in self.steps for event in step]
        self.messages = [e.message for e in self.events if isinstance(e, MessageDone)]
        self.diagnostics = [(e.kind, e.detail) for e in self.events if isinstance(e, Diagnostic)]
        self.calls = [e for e in self.events if isinstance(e, ToolCall)]

    @staticmethod
    def encode(tokenizer: Tokenizer, text: str) -> list[int]:
        ids: list[int] = []
        for part in MARKUP.split(text):
            if MARKUP.fullmatch(part):
                name = part[2:-2]
                ids.append(getattr(tokenizer.special, "return_" if name == "return" else name))
            else:
                ids += tokenizer.encode(part)
        return ids

    def said(self, kind: type) -> str:
        """The deltas of one kind, joined."""
        deltas = [e for e in self.events if type(e) is kind]
        return "".join(str(getattr(e, "arguments" if kind is ToolCallDelta else "text")) for e in deltas)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.diagnostics]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("bytes"))


def test_reasoning_preamble_call_and_answer_become_their_events(tokenizer: Tokenizer) -> None:
    stream = Stream(
        tokenizer,
        "<|channel|>analysis<|message|>Hm é<|end|><|start|>assistant<|channel|>commentary<|message|>Let me "
        f"look.<|end|><|start|>assistant{CALL}<|start|>assistant<|channel|>final<|message|>日本 😀<|return|>",
    )
    assert not stream.diagnostics
    assert stream.said(ReasoningDelta) == "Hm é"
    assert stream.said(PreambleDelta) == "Let me look."
    assert stream.said(ToolCallDelta) == '{"city": "Zürich"}'
    assert stream.said(TextDelta) == "日本 😀"
    assert stream.calls == [
        ToolCall(0, "call_1", "get_weather", '{"city": "Zürich"}', "functions.get_weather")
    ]
    assert [m.channel for m in stream.messages] == ["analysis", "commentary", "commentary", "final"]
    assert stream.messages[2].call_id == "call_1"
    assert stream.messages[2].content_type == "<|constrain|>json"


def test_arguments_stream_as_they_are_sampled(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, CALL)
    deltas = [e for step in stream.steps for e in step if isinstance(e, ToolCallDelta)]
    assert deltas[0] == ToolCallDelta(0, "call_1", "get_weather", "")
    assert len(deltas) > 15
    body = stream.ids.index(tokenizer.special.message)
    assert stream.steps[body] == [deltas[0]]
    assert stream.steps[body + 1] == [ToolCallDelta(0, "call_1", "get_weather", "{")]
    assert [type(e) for e in stream.steps[-2]] == [ToolCall, MessageDone]


def test_calls_are_numbered_and_have_ids_of_their_own(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, f"{CALL}<|start|>assistant{CALL}")
    assert [(c.index, c.call_id) for c in stream.calls] == [(0, "call_1"), (1, "call_2")]
    parsers = [StreamParser(tokenizer) for _ in range(2)]
    for parser in parsers:
        for token in stream.ids:
            parser.push(token)
    ids = [m.call_id for parser in parsers for m in parser.messages]
    assert len(set(ids)) == 4


def test_token_ids_are_those_sampled_after_the_role(tokenizer: Tokenizer) -> None:
    first = "<|channel|>analysis<|message|>a<|end|>"
    second = "<|channel|>final<|message|>b<|return|>"
    stream = Stream(tokenizer, f"{first}<|start|>assistant{second}")
    assert [list(m.token_ids or ()) for m in stream.messages] == [
        Stream.encode(tokenizer, first),
        Stream.encode(tokenizer, second),
    ]


def test_a_whole_transcript_gives_back_the_messages_it_was_rendered_from(tokenizer: Tokenizer) -> None:
    messages = [
        Message("user", "Wie geht's?", name="ann"),
        Message.reasoning("thinking"),
        Message.tool_call("get_weather", '{"city": "Zürich"}', "call_1"),
        Message.tool_result('"sunny"', name="functions.get_weather"),
        Message.assistant("Gut."),
        Message("assistant", '{"a": 1}', channel="final", content_type="<|constrain|>json"),
    ]
    ids = render(Conversation(messages), tokenizer, for_completion=False, drop_analysis=False)
    stream = Stream(tokenizer, ids, from_start=True)
    assert not stream.diagnostics
    seen = [(m.role, m.name, m.recipient, m.channel, m.content_type, m.content) for m in stream.messages]
    expected = [(m.role, m.name, m.recipient, m.channel, m.content_type, m.content) for m in messages]
    assert seen[1:] == expected


def test_a_character_is_never_cut(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, "<|channel|>final<|message|>é日😀<|return|>")
    assert [e.text for e in stream.events if isinstance(e, TextDelta)] == ["é", "日", "😀"]


def test_a_built_in_tool_may_be_called_while_reasoning(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, "<|channel|>analysis to=python code<|message|>1+1<|call|>")
    assert not stream.diagnostics
    assert stream.calls == [ToolCall(0, "call_1", "python", "1+1", "python")]
    assert stream.messages[0].content_type == "code"
    stream = Stream(tokenizer, "<|channel|>analysis to=browser.search<|message|>{}<|call|>")
    assert (stream.calls[0].name, stream.diagnostics) == ("browser.search", [])


def test_the_recipient_may_stand_before_or_after_the_channel(tokenizer: Tokenizer) -> None:
    after = Stream(tokenizer, "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>")
    before = Stream(tokenizer, " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>")
    assert after.calls == before.calls and len(after.calls) == 1
    assert not after.diagnostics and not before.diagnostics
    for one, other in zip(after.messages, before.messages, strict=True):
        assert (one.recipient, one.channel, one.content_type) == (
            other.recipient,
            other.channel,
            other.content_type,
        )


def test_a_recipient_without_functions_is_the_same_call(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, "<|channel|>commentary to=get_weather json<|message|>{}<|call|>")
    assert stream.calls == [ToolCall(0, "call_1", "get_weather", "{}", "get_weather")]
    assert stream.diagnostics == [("bare_recipient", "get_weather")]


def test_commentary_without_a_recipient_is_a_preamble_and_no_answer(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, "<|channel|>commentary<|message|>First I look.<|end|>")
    assert stream.said(PreambleDelta) == "First I look."
    assert stream.said(TextDelta) == "" and not stream.diagnostics and not stream.calls


# Malformed forms: the stream, the messages recovered as (role, channel, recipient, content), the diagnostics.
MALFORMED: dict[str, tuple[str, list[tuple[str, str | None, str | None, str]], list[str]]] = {
    "a stop token inside a header": (
        "<|channel|>final<|return|>",
        [("assistant", "final", None, "")],
        ["missing_message"],
    ),
    "start twice": (
        "<|channel|>analysis<|message|>a<|end|><|start|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["duplicate_start"],
    ),
    "the role sampled once more": (
        "<|start|>assistant<|channel|>final<|message|>b<|return|>",
        [("assistant", "final", None, "b")],
        ["duplicate_start"],
    ),
    "return after end": (
        "<|channel|>final<|message|>b<|end|><|return|>",
        [("assistant", "final", None, "b")],
        ["stray_end"],
    ),
    "a refusal with no message token": (
        "I'm sorry, but I can't help with that.<|return|>",
        [("assistant", "final", None, "I'm sorry, but I can't help with that.")],
        ["missing_message", "missing_channel"],
    ),
    "a function called on the analysis channel": (
        "<|channel|>analysis to=functions.f <|constrain|>json<|message|>{}<|call|>",
        [("assistant", "analysis", "functions.f", "{}")],
        ["call_on_other_channel"],
    ),
    "the answer trapped in a header": (
        "<|channel|>finalHello there, friend<|return|>",
        [("assistant", "final", None, "Hello there, friend")],
        ["missing_message"],
    ),
    "a long answer trapped in a header": (
        "<|channel|>final Well, one two three four five six seven eight nine ten<|return|>",
        [("assistant", "final", None, "Well, one two three four five six seven eight nine ten")],
        ["long_header"],
    ),
    "the answer in a header that is completed": (
        "<|channel|>final Sure, here it<|message|> is<|return|>",
        [("assistant", "final", None, "Sure, here it  is")],
        ["header_text"],
    ),
    "arguments trapped in a header": (
        '<|channel|>commentary to=functions.f <|constrain|>json{"a": 1}<|call|>',
        [("assistant", "commentary", "functions.f", '{"a": 1}')],
        ["missing_message"],
    ),
    "an unknown role": (
        "<|channel|>analysis<|message|>a<|end|><|start|>model<|channel|>final<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["unknown_role"],
    ),
    "someone else's role": (
        "<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|end|>",
        [("assistant", "final", None, "a"), ("user", None, None, "b")],
        ["foreign_role"],
    ),
    "the stream ends inside a header": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fin",
        [("assistant", "analysis", None, "a")],
        ["truncated_header"],
    ),
    "the stream ends after start": (
        "<|channel|>analysis<|message|>a<|end|><|start|>",
        [("assistant", "analysis", None, "a")],
        ["truncated_header"],
    ),
    "the stream ends inside a call": (
        '<|channel|>commentary to=functions.f<|message|>{"a": ',
        [("assistant", "commentary", "functions.f", '{"a": ')],
        ["unfinished_call"],
    ),
    "the stream ends inside a call's header": (
        "<|channel|>commentary to=functions.get_w",
        [("assistant", "commentary", "functions.get_w", "")],
        ["truncated_header", "unfinished_call"],
    ),
    "start without end": (
        "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["missing_end"],
    ),
    "a channel inside a message": (
        "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["missing_end"],
    ),
    "no start after end": (
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["missing_start"],
    ),
    "text between messages": (
        "<|channel|>analysis<|message|>a<|end|>Hello you<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "Hello you")],
        ["missing_start", "missing_message", "missing_channel"],
    ),
    "message twice": (
        "<|channel|>final<|message|><|message|>b<|return|>",
        [("assistant", "final", None, "b")],
        ["stray_token"],
    ),
    "endoftext for an end": (
        "<|channel|>final<|message|>b<|endoftext|>",
        [("assistant", "final", None, "b")],
        ["missing_end"],
    ),
    "a channel without its marker": (
        "analysis<|message|>a<|end|>",
        [("assistant", "analysis", None, "a")],
        ["channel_without_marker"],
    ),
    "role and channel run together": (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistantfinal<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["unknown_role", "channel_without_marker"],
    ),
    "channel and recipient run together": (
        "<|channel|>commentaryto=functions.f json<|message|>{}<|call|>",
        [("assistant", "commentary", "functions.f", "{}")],
        ["unknown_channel"],
    ),
    "reasoning run into the channel's name": (
        "<|channel|>analysisWe need it<|end|>",
        [("assistant", "analysis", None, "We need it")],
        ["missing_message"],
    ),
    "a channel that does not exist": (
        "<|channel|>summary<|message|>b<|return|>",
        [("assistant", "summary", None, "b")],
        ["unknown_channel"],
    ),
    "two channels": (
        "<|channel|>analysis<|channel|>final<|message|>b<|return|>",
        [("assistant", "final", None, "b")],
        ["duplicate_channel"],
    ),
    "no channel": ("<|message|>b<|return|>", [("assistant", None, None, "b")], ["missing_channel"]),
    "no role": (
        "<|channel|>analysis<|message|>a<|end|><|start|><|channel|>final<|message|>b<|return|>",
        [("assistant", "analysis", None, "a"), ("assistant", "final", None, "b")],
        ["missing_role"],
    ),
    "a recipient without to=": (
        "<|channel|>commentary functions.f <|constrain|>json<|message|>{}<|call|>",
        [("assistant", "commentary", "functions.f", "{}")],
        ["recipient_without_to"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_structure_is_mended_and_reported(case: str, tokenizer: Tokenizer) -> None:
    text, expected, kinds = MALFORMED[case]
    stream = Stream(tokenizer, text)
    assert [(m.role, m.channel, m.recipient, m.content) for m in stream.messages] == expected
    assert stream.kinds == kinds
    shown = "".join(
        c for role, channel, to, c in expected if channel not in ("analysis", "commentary") and role != "user"
    )
    assert stream.said(TextDelta) == shown


@pytest.mark.parametrize("to", ["", " to=assistant", " to=user"])
@pytest.mark.parametrize("live", [True, False])
def test_a_role_that_is_none_is_a_tools_where_more_words_say_so(
    to: str, live: bool, tokenizer: Tokenizer
) -> None:
    begun = "<|channel|>final<|message|>a<|end|>" if live else "<|start|>user<|message|>a<|end|>"
    stream = Stream(tokenizer, f"{begun}<|start|>weather{to}<|message|>b<|end|>", from_start=not live)
    from_tool = to == " to=assistant" or (to != "" and not live)
    message = stream.messages[1]
    assert (message.role, message.name) == (("tool", "weather") if from_tool else ("assistant", None))
    assert ("unknown_role" in stream.kinds) == (not from_tool)


@pytest.mark.parametrize("characters", [512, 513])
def test_a_header_may_be_so_long_and_no_longer(characters: int, tokenizer: Tokenizer) -> None:
    name = "f" * (characters - len("commentary to=functions."))
    stream = Stream(tokenizer, f"<|channel|>commentary to=functions.{name}<|message|>{{}}<|call|>")
    assert ("long_header" in stream.kinds) == (characters > 512)
    assert characters > 512 or [call.name for call in stream.calls] == [name]


@pytest.mark.parametrize("recipient", ["functions.f", "browser.open", "python"])
def test_a_call_that_is_cut_off_is_reported_with_its_recipient(recipient: str, tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, f'<|channel|>commentary to={recipient}<|message|>{{"a": ')
    assert ("unfinished_call", recipient) in stream.diagnostics and not stream.calls


def test_every_diagnostic_is_met_in_a_test(tokenizer: Tokenizer) -> None:
    met = {kind for _, _, kinds in MALFORMED.values() for kind in kinds}
    assert met | {"bare_recipient", "incomplete_utf8", "unknown_token"} == DIAGNOSTICS.keys()


def test_a_stream_that_ends_inside_a_character_shows_a_replacement(tokenizer: Tokenizer) -> None:
    ids = Stream.encode(tokenizer, "<|channel|>final<|message|>aé")[:-1]
    stream = Stream(tokenizer, ids)
    assert stream.messages[0].content == "a\ufffd" == stream.said(TextDelta)
    assert stream.kinds == ["incomplete_utf8"]
    stream = Stream(tokenizer, [*ids, tokenizer.special.end])
    assert (stream.messages[0].content, stream.kinds) == ("a\ufffd", ["incomplete_utf8"])


@pytest.mark.parametrize("token", [-1, -(2**70), 10**6, 2**70])
def test_an_id_outside_the_vocabulary_is_reported(token: int, tokenizer: Tokenizer) -> None:
    ids = Stream.encode(tokenizer, "<|channel|>final<|message|>ab")
    stream = Stream(tokenizer, [token, *ids[:-1], token, ids[-1], tokenizer.special.end, token])
    assert stream.messages[0].content == "ab"
    assert stream.diagnostics == [("unknown_token", str(token))] * 3


def test_a_call_cut_off_after_its_last_brace_is_complete(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, '<|channel|>commentary to=functions.f<|message|>{"a": 1}')
    assert [c.arguments for c in stream.calls] == ['{"a": 1}'] and not stream.diagnostics


def test_reasoning_is_never_part_of_the_answer(tokenizer: Tokenizer) -> None:
    text = (
        "<|channel|>analysis<|message|>secret<|end|><|start|>assistant<|channel|>final<|message|>open<|end|>"
    )
    builder = ReplyBuilder()
    builder.add(Stream(tokenizer, text).events)
    reply = builder.build("stop", Usage())
    assert (reply.text, reply.reasoning) == ("open", "secret")
    assert [m.content for m in reply.messages] == ["secret", "open"]


def test_diagnostics_point_at_their_token(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, "<|channel|>final<|message|>b<|end|><|return|>")
    (diagnostic,) = [e for e in stream.events if isinstance(e, Diagnostic)]
    assert stream.ids[diagnostic.position] == tokenizer.special.return_


def test_a_parser_reads_on_after_the_end(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer, from_start=True)
    for token in Stream.encode(tokenizer, "<|start|>user<|message|>a"):
        parser.push(token)
    assert len(parser.finish()) == 1
    assert parser.finish() == []
    for token in Stream.encode(tokenizer, "<|start|>user<|message|>b<|end|>"):
        parser.push(token)
    assert [m.content for m in parser.messages] == ["a", "b"]


def test_any_sequence_of_tokens_is_parsed_and_accounted_for(tokenizer: Tokenizer) -> None:
    maker = fuzz_harmony.Maker(tokenizer)
    met: set[str] = set()
    for seed in range(3000):
        ids, from_start = maker.sequence(seed)
        try:
            events = fuzz_harmony.check(tokenizer, ids, from_start)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {ids}") from error
        met |= {e.kind for e in events if isinstance(e, Diagnostic)}
    assert met == DIAGNOSTICS.keys()


# Where a header is malformed the library accepts some nonsense, such as markup for a recipient.
MENDED = {
    *("missing_start", "duplicate_start", "missing_message", "long_header", "missing_end", "stray_token"),
    *("missing_role", "unknown_role", "unknown_channel", "duplicate_channel", "channel_without_marker"),
    *("recipient_without_to", "header_text", "unknown_token"),
}


def as_ours(fields: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The library's message with its two deliberate differences taken out: a lone content type is no
    recipient, and "role:name" is a role and a name."""
    role, name, recipient, channel, content_type, content = fields
    of_type = re.match(r"(json|code|text)$|<\|constrain\|>", recipient or "")
    if content_type is None and of_type:
        recipient, content_type = None, recipient
    if role == "tool" and name is not None and name.startswith("user:"):
        role, name = "user", name.removeprefix("user:")
    return role, name, recipient, channel, content_type, content


def test_parsing_equals_openai_harmony_on_what_it_accepts() -> None:
    tokenizer = require_tokenizer()
    from openai_harmony import HarmonyError, Role

    from tests.support import harmony_library

    library = harmony_library.encoding()
    maker = fuzz_harmony.Maker(tokenizer)
    accepted = 0
    for seed in range(2500):
        ids, from_start = maker.sequence(seed)
        ids = [token for token in ids if 0 <= token < tokenizer.vocab_size]
        try:
            theirs = library.parse_messages_from_completion_tokens(
                ids, None if from_start else Role.ASSISTANT
            )
        except HarmonyError:
            continue
        stream = Stream(tokenizer, ids, from_start=from_start)
        if MENDED.isdisjoint(stream.kinds):
            accepted += 1
            ours = [harmony_library.fields(m) for m in stream.messages]
            assert ours == [as_ours(harmony_library.fields(m)) for m in theirs], f"seed {seed}"
    assert accepted > 500


def test_rendered_conversations_parse_as_openai_harmony_parses_them() -> None:
    tokenizer = require_tokenizer()
    from openai_harmony import HarmonyError

    from tests.support import harmony_library

    library = harmony_library.encoding()
    accepted = 0
    for seed in range(150):
        ids = render(harmony_corpus.conversation(seed), tokenizer, for_completion=False)
        stream = Stream(tokenizer, ids, from_start=True)
        assert not stream.diagnostics, f"seed {seed}"
        try:
            theirs = library.parse_messages_from_completion_tokens(ids, None)
        except HarmonyError as error:
            assert "Unknown role: user:" in str(error)  # the library cannot read a user's name that it wrote
            continue
        accepted += 1
        ours = [harmony_library.fields(m) for m in stream.messages]
        assert ours == [as_ours(harmony_library.fields(m)) for m in theirs], f"seed {seed}"
    assert accepted > 75


def test_the_table_of_diagnostics_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "harmony.md").read_text(encoding="utf-8")
    assert not [kind for kind in DIAGNOSTICS if f"`{kind}`" not in text]
