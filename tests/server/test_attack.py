"""The short form of benchmarks/attack.py: every family of hostile bodies and schemas while a stream runs."""

from __future__ import annotations

from benchmarks.attack import BODIES, SCHEMAS, Stream, attack, demo_server, status, unanswered
from tests.support.server_help import wait_until


def test_the_server_outlives_every_family_of_attack_and_goes_on_streaming() -> None:
    """How long the stream waits, and what stays of memory, are for the benchmark to tell."""
    with demo_server() as server, Stream(server) as stream:
        statuses = attack(server, len(BODIES), len(SCHEMAS), senders=2, seed=0)
        assert unanswered(statuses) == {}
        assert statuses[400] and statuses[200]
        assert status(server, "/health", b"", "GET") == 200
        seen = stream.tokens
        wait_until(lambda: stream.tokens > seen or stream.failure)
    assert stream.failure is None and stream.tokens > seen > 0
