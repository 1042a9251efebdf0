"""The short form of benchmarks/attack.py: every family of hostile bodies and schemas while a stream runs."""

from __future__ import annotations

from benchmarks.attack import BODIES, SCHEMAS, run

# The benchmark's own limit is a second; a test shares its processors with others.
MAX_GAP = 5.0


def test_the_server_outlives_every_family_of_attack_and_goes_on_streaming() -> None:
    outcome = run(len(BODIES), len(SCHEMAS), senders=2, quiet=0.0)
    # What stays of memory is for the benchmark to tell: it depends on what the allocator keeps.
    assert [told for told in outcome.complaints(MAX_GAP) if "stayed" not in told] == []
    assert outcome.tokens > 0
    assert outcome.statuses[400] and outcome.statuses[200]
