"""A long answer as it comes: the page stays responsive, and shows what came at once."""

from __future__ import annotations

import sys

from tests.page.browser import Page, scripted
from tests.page.streaming import ANSWER, longest_and_last
from tests.support.scripted_llm import Script

pytest_plugins = ["tests.support.server_fixtures"]


def test_5000_tokens_never_block_the_page_and_are_shown_at_once(page: Page) -> None:
    assert 4 * 4000 <= len(ANSWER) <= 4 * 6000
    page.llm.write = scripted(Script(text=ANSWER, delay=0.002))
    runs: list[tuple[float, float]] = []
    # By the clock on the wall, which also counts what else the machine does: the best of some runs.
    bound = 200 if sys.gettrace() is None else 1000  # coverage slows the server beside the page
    while len(runs) < 4 and not any(longest <= 50 and late <= bound for longest, late in runs):
        runs.append(longest_and_last(page))
        print("longest task {:.0f} ms, last delta shown after {:.0f} ms".format(*runs[-1]))
    assert any(longest <= 50 and late <= bound for longest, late in runs), runs
