"""The process in which grammars are tried: a JSON line [grammar, seconds] in, a JSON line with the error out.

Run by its path, so that it imports llguidance and nothing of the package. See guard.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from functools import cache
from typing import Any

SECONDS = 2.0  # of processor time for a grammar
MEMORY = 2 * 2**30  # address space
# A quarter of what a thread has on Linux, an eighth on macOS: what passes here does not overflow there.
STACK = 2 * 2**20
STEPS = 16  # tokens of a walk through the grammar, to meet what crashes after the first
TIMED_OUT = -signal.SIGPROF


@cache
def vocabulary() -> Any:
    """A vocabulary of bytes: whether a grammar does harm hardly depends on the tokens."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def verdict(grammar: str) -> str:
    """What is wrong with a grammar, "" when it compiles; then a walk, for what crashes only on the way."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary(), grammar, log_level=0)
    if matcher.is_error():
        return str(matcher.get_error())
    for _ in range(STEPS):
        mask = matcher.compute_bitmask()
        byte = next((i for i, bits in enumerate(mask) if bits), None)
        if byte is None or not matcher.consume_token(8 * byte + mask[byte].bit_length() - 1):
            break
    return ""


def serve() -> None:
    """Answer lines until there are none. A grammar that takes too long ends the process by SIGPROF."""
    for line in sys.stdin:
        grammar, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = verdict(grammar)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Take the limits and serve, on a thread with a small stack."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
