"""What a token costs the parser, at the start of a long stream and at its end; and a prompt to render.

    python -m benchmarks.harmony [--tokens 100000] [--tokenizer FOLDER] [--library]

Prints nanoseconds per token for each tenth of one stream, once as a single message and once as many short
ones, and the ratio of the last tenth to the first. Exits 1 when that ratio is above 1.5. Times are of the
process, the best of five passes. --tokenizer names a folder with a tokenizer.json; without it the vocabulary
is the tests' (bytes and a few words). --library times openai-harmony beside it, reading its state at each
token as a server must; this needs the real vocabulary and the file that library loads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlx_gptoss.harmony import Conversation, Message, StreamParser, Tool, render
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.byte_tokenizer import write_byte_tokenizer

PARTS = 10
PASSES = 5
MOST = 1.5


def streams(tokenizer: Tokenizer, length: int) -> dict[str, list[int]]:
    """Token streams of `length`: one long answer, one long call, and many short messages."""
    s = tokenizer.special
    text = tokenizer.encode("The quick brown fox, naïve and 日本, jumps 12 times. 😀\n")

    def fill(head: list[int], unit: list[int]) -> list[int]:
        return (head + unit * (length // len(unit) + 1))[:length]

    final = [s.channel, *tokenizer.encode("final"), s.message]
    call = [s.channel, *tokenizer.encode("commentary to=functions.write "), s.constrain]
    call += [*tokenizer.encode("json"), s.message]
    short = [s.start, *tokenizer.encode("assistant"), s.channel, *tokenizer.encode("analysis"), s.message]
    return {
        "one answer": fill(final, text),
        "one call": fill(call, tokenizer.encode('{"text": "Zürich", "n": [1, 2]} ')),
        "many messages": fill([*final, *text, s.end], [*short, *text, s.end]),
        "malformed": fill([], [s.start, *text, s.channel, s.end, s.constrain, *text[:5], s.message]),
    }


def per_token(push: Callable[[], Callable[[int], object]], ids: list[int]) -> list[float]:
    """Nanoseconds per token in each tenth of the stream, the best of the passes. `push()` starts one."""
    size = len(ids) // PARTS
    best = [float("inf")] * PARTS
    for _ in range(PASSES):
        take = push()
        for part in range(PARTS):
            tokens = ids[part * size : (part + 1) * size]
            began = time.process_time_ns()
            for token in tokens:
                take(token)
            best[part] = min(best[part], (time.process_time_ns() - began) / size)
    return best


def library_parsers() -> Callable[[], Callable[[int], object]]:
    """Starts parsers of openai-harmony whose state is read at each token."""
    from openai_harmony import HarmonyEncodingName, Role, StreamableParser, load_harmony_encoding

    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)

    def start() -> Callable[[int], object]:
        parser = StreamableParser(encoding, Role.ASSISTANT)

        def push(token: int) -> object:
            parser.process(token)
            return parser.current_channel, parser.last_content_delta, parser.current_content

        return push

    return start


def render_times(tokenizer: Tokenizer) -> None:
    """Print what a prompt with tools and turns takes to render."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(8)}}
    tools = [Tool(f"tool_{i}", "Does something useful.", schema) for i in range(20)]
    turn = [Message.user("What about this one? " * 20), Message.assistant("It is like that. " * 40)]
    conversation = Conversation(turn * 20, instructions="Be brief.", tools=tools)
    best, count = float("inf"), 0
    for _ in range(PASSES):
        began = time.process_time_ns()
        count = len(render(conversation, tokenizer))
        best = min(best, (time.process_time_ns() - began) / 1e6)
    print(f"render: 20 tools, 40 messages, {count:,} tokens: {best:.1f} ms")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=100_000)
    arguments.add_argument("--tokenizer", type=Path)
    arguments.add_argument("--library", action="store_true")
    options = arguments.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.from_folder(options.tokenizer or write_byte_tokenizer(folder))
        for name, ids in streams(tokenizer, options.tokens).items():
            times = per_token(lambda: StreamParser(tokenizer).push, ids)
            ratio = times[-1] / times[0]
            worst = max(worst, ratio)
            print(f"{name:14} {len(ids):,} tokens: {times[0]:.0f} ns a token at the start, ", end="")
            print(f"{times[-1]:.0f} at the end: {ratio:.2f}x")
        if options.library:
            ids = streams(tokenizer, options.tokens)["one answer"][:10_000]
            times = per_token(library_parsers(), ids)
            print(f"openai-harmony {len(ids):,} tokens: {times[0]:.0f} ns a token at the start, ", end="")
            print(f"{times[-1]:.0f} at the end: {times[-1] / times[0]:.2f}x")
        render_times(tokenizer)
    return 0 if worst <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
