"""Fuzzing the parser: random, mutated, truncated and spliced transcripts, and what must hold for each.

Run by `make fuzz` on many sequences (`python -m tests.support.fuzz_harmony --count 100000 --seed 1`); the
suite runs a slice. Every sequence is made from its seed alone, so that a failure can be seen again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from random import Random

from mlx_gptoss.harmony import (
    DIAGNOSTICS,
    Diagnostic,
    Event,
    MessageDone,
    PreambleDelta,
    ReasoningDelta,
    StreamParser,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    render_message,
)
from mlx_gptoss.tokenizer import Tokenizer

WORDS = (
    *("assistant", "user", "tool", "system", "developer", "analysis", "commentary", "final", "json", "code"),
    *(" to=", "to=functions.get", " to=python", "functions.x", "browser.search", " to=assistant", "user:ann"),
    *(
        " ",
        "\n",
        "\t",
        "{",
        '{"a": 1}',
        "}",
        "Hello",
        " there",
        "I'm sorry",
        "é",
        "日本",
        "😀",
        "\u3000",
        "<",
    ),
    *(
        "commentaryto=",
        "assistantfinal",
        "<|start|>",
        "to=",
        "<|constrain|>json",
        "finally",
        "A b c d e f g h i j",
    ),
)
TEMPLATES = (
    "S assistant C analysis M think E S assistant C final M answer R",
    "S assistant C commentary TO K json M args L S tool_name TOA C commentary M result E",
    "S assistant TO C commentary K json M args L",
    "S assistant C commentary M preamble E S assistant C analysis TOP code M args L",
    "S user M question E S assistant C final M answer E",
    "S system M rules E S developer M more E S user M q E S assistant C final K json M args R",
    "S user_named M q E S assistant C analysis M think E",
)


class Maker:
    """Makes token sequences for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        s = tokenizer.special
        self.marks = {"S": s.start, "E": s.end, "M": s.message, "C": s.channel, "K": s.constrain}
        self.marks |= {"L": s.call, "R": s.return_, "X": s.endoftext, "Z": s.startoftext}
        self.words = {word: tokenizer.encode(word) for word in WORDS}
        self.pieces = {
            **{w: tokenizer.encode(w) for w in ("assistant", "user", "system", "developer", "json")},
            **{w: tokenizer.encode(w) for w in ("analysis", "commentary", "final")},
            "TO": tokenizer.encode(" to=functions.get_weather "),
            "TOA": tokenizer.encode(" to=assistant"),
            "TOP": tokenizer.encode(" to=python"),
            "code": tokenizer.encode(" code"),
            "tool_name": tokenizer.encode("functions.get_weather"),
            "user_named": tokenizer.encode("user:ann"),
            "args": tokenizer.encode('{"city": "Zürich", "n": [1, 2]}'),
        }

    def sequence(self, seed: int) -> tuple[list[int], bool]:
        """(token ids, whether they start before the first `<|start|>`) of this seed."""
        rng = Random(seed)
        from_start = rng.random() < 0.5
        kind = rng.randrange(5)
        if kind == 0:
            ids = [self.token(rng) for _ in range(rng.randint(0, 40))]
        else:
            ids = self.transcript(rng)
            if kind == 2:
                ids = self.mutated(ids, rng)
            elif kind == 3:
                ids = ids[: rng.randint(0, len(ids))]
            elif kind == 4:
                other = self.mutated(self.transcript(rng), rng)
                ids = ids[: rng.randint(0, len(ids))] + other[rng.randint(0, len(other)) :]
        if not from_start and ids[:1] == [self.marks["S"]] and rng.random() < 0.9:
            ids = ids[1 + len(self.pieces["assistant"]) :]
        return ids, from_start

    def token(self, rng: Random) -> int:
        """Any token: markup, a byte, or an id that is not there."""
        kind = rng.randrange(10)
        if kind < 5:
            return rng.choice(list(self.marks.values()))
        if kind < 9:
            return rng.choice(self.words[rng.choice(WORDS)])
        return rng.choice([rng.randrange(self.tokenizer.vocab_size), rng.randrange(256), 10**6, -1])

    def transcript(self, rng: Random) -> list[int]:
        """A well-formed transcript with random text."""
        ids: list[int] = []
        for part in " ".join(rng.choices(TEMPLATES, k=rng.randint(1, 3))).split():
            if part in self.marks:
                ids.append(self.marks[part])
            elif part in self.pieces:
                ids += self.pieces[part]
            else:
                for _ in range(rng.randint(0, 6)):
                    ids += self.words[rng.choice(WORDS)]
        return ids

    def mutated(self, ids: list[int], rng: Random) -> list[int]:
        """The same with tokens dropped, doubled, swapped, replaced or inserted."""
        ids = list(ids)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(ids) + 1)
            change = rng.randrange(5)
            if change == 0:
                del ids[at : at + rng.randint(1, 3)]
            elif change == 1:
                ids[at:at] = ids[at : at + 1]
            elif change == 2:
                ids[at:at] = self.words[rng.choice(WORDS)]
            elif change == 3:
                ids[at : at + 1] = [self.token(rng)]
            else:
                ids[at:at] = [rng.choice(list(self.marks.values()))]
        return ids


def parse(tokenizer: Tokenizer, ids: list[int], from_start: bool) -> tuple[list[Event], StreamParser]:
    """All events of a sequence."""
    parser = StreamParser(tokenizer, from_start=from_start)
    events = [event for token in ids for event in parser.push(token)]
    return events + parser.finish(), parser


def check(tokenizer: Tokenizer, ids: list[int], from_start: bool) -> list[Event]:
    """Raise AssertionError unless all that must hold for any sequence holds; return the events."""
    events, parser = parse(tokenizer, ids, from_start)
    messages = [e.message for e in events if isinstance(e, MessageDone)]
    assert messages == parser.messages
    for message in messages:
        # What was recovered can stand in the next prompt, and as one message.
        again = render_message(message, tokenizer)
        assert again.count(tokenizer.special.start) == 1
        assert again[-1] in (tokenizer.special.end, tokenizer.special.call)
    _check_deltas(events)
    _check_text(tokenizer, ids, events)
    for event in events:
        if isinstance(event, Diagnostic):
            assert event.kind in DIAGNOSTICS, event
            assert 0 <= event.position <= len(ids), event
    return events


def _check_deltas(events: list[Event]) -> None:
    """Deltas of a message join to its content, and calls to their arguments."""
    parts: list[str] = []
    kinds: set[type] = set()
    call: ToolCall | None = None
    for event in events:
        if isinstance(event, TextDelta | ReasoningDelta | PreambleDelta):
            assert event.text
            parts.append(event.text)
            kinds.add(type(event))
        elif isinstance(event, ToolCallDelta):
            assert event.arguments or not parts
            parts.append(event.arguments)
            kinds.add(type(event))
        elif isinstance(event, ToolCall):
            call = event
            assert event.arguments == "".join(parts)
        elif isinstance(event, MessageDone):
            message = event.message
            assert len(kinds) <= 1
            if message.role == "assistant":
                assert message.content == "".join(parts), event
            else:
                assert not parts
            assert call is None or call.call_id == message.call_id
            expected = {"analysis": ReasoningDelta, "commentary": PreambleDelta}.get(
                message.channel or "", TextDelta
            )
            assert not kinds or kinds == {ToolCallDelta} or kinds == {expected}
            parts, kinds, call = [], set(), None
    assert not parts


def _check_text(tokenizer: Tokenizer, ids: list[int], events: list[Event]) -> None:
    """What stands after a `<|message|>` ends the content of a message, exactly and in order; all other text
    is in a message's fields or content, or in a diagnostic's detail."""
    out, contents = [], []
    for event in events:
        if isinstance(event, MessageDone):
            m = event.message
            out += [m.role, m.name or "", m.recipient or "", m.channel or "", m.content_type or "", m.content]
            contents.append(m.content)
        elif isinstance(event, Diagnostic):
            out.append(event.detail)
    runs, bodies = _runs(tokenizer, ids)
    remaining = iter(contents)
    for body in bodies:
        assert any(content.endswith(body) for content in remaining), (body, contents)
    # White space, "to=" and the colon before a name are markup of a header. U+FFFD stands for bytes that are
    # no character by themselves: they may be one together with those of the next run.
    missing = _letters(runs) - _letters(out)
    recipients = "".join(runs).count("to=")
    assert all(c in "to=" and count <= recipients for c, count in missing.items()), (missing, out)


def _letters(texts: list[str]) -> Counter[str]:
    return Counter(c for c in "".join(texts) if not c.isspace() and c not in ":\ufffd")


def _runs(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], list[str]]:
    """(the text between special tokens, the text of each stretch from `<|message|>` to what ends it)."""
    s = tokenizer.special
    ends = (s.start, s.channel, s.end, s.call, s.return_, s.endoftext)
    detokenizer, body_detokenizer = tokenizer.detokenizer(), tokenizer.detokenizer()
    runs: list[str] = []
    bodies: list[str] = []
    inside = False
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            continue
        if not tokenizer.is_special(token):
            runs.append(detokenizer.push(token))
            if inside:
                bodies[-1] += body_detokenizer.push(token)
            continue
        runs.append(detokenizer.finish())
        if inside and token in ends:
            bodies[-1] += body_detokenizer.finish()
            inside = False
        elif token == s.message and not inside:
            bodies.append("")
            inside = True
    if inside:
        bodies[-1] += body_detokenizer.finish()
    return [*runs, detokenizer.finish()], bodies


def main(argv: list[str] | None = None) -> int:
    """Fuzz `--count` sequences from `--seed` on; print what was met, and return 1 at the first failure."""
    import tempfile

    from tests.support.byte_tokenizer import byte_tokenizer

    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--count", type=int, default=100_000)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args(argv)
    kinds: Counter[str] = Counter()
    tokens, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_tokenizer(folder)
        maker = Maker(tokenizer)
        for seed in range(options.seed, options.seed + options.count):
            ids, from_start = maker.sequence(seed)
            tokens += len(ids)
            try:
                events = check(tokenizer, ids, from_start)
            except Exception:
                print(f"seed {seed}, from_start={from_start}: {ids}", file=sys.stderr)
                raise
            kinds.update(e.kind for e in events if isinstance(e, Diagnostic))
    seconds = time.perf_counter() - began
    print(f"{options.count:,} sequences of {tokens:,} tokens in {seconds:.0f} s: all text accounted for")
    for kind, count in kinds.most_common():
        print(f"{count:>9,}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
