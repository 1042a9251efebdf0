"""Tools that the server runs, in the page: switched on for each chat, shown, and approved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_gptoss.server.tools.toolbox import Toolbox
from tests.page.browser import Keys, Page
from tests.page.test_access import AXE, violations
from tests.page.test_chat import last
from tests.server.test_server_tools import NOTE, WEATHER, calls
from tests.support.served_tools import served_tools

pytest_plugins = ["tests.support.server_fixtures"]

BOX = "#served input[value='mcp:toy']"


@pytest.fixture(scope="module")
def toolbox() -> Iterator[Toolbox]:
    with served_tools() as made:
        yield made


def switch(page: Page, *boxes: str) -> None:
    page.click("#tune")
    for box in boxes:
        page.click(box)
    page.press(Keys.ESCAPE)


def test_switches_are_off_at_first_and_kept_for_each_chat(page: Page) -> None:
    page.llm.write = calls()
    page.say("plain")
    conversation, _ = page.llm.seen[-1]
    assert not conversation.tools and not conversation.builtin
    page.click("#tune")
    assert page.text("#served label").startswith("toy")
    assert "get_weather" in page.text("#served small")
    assert not page.find("#served input:checked")
    page.click("#served input[value=python]")
    page.click(BOX)
    page.press(Keys.ESCAPE)
    page.say("with tools")
    conversation, _ = page.llm.seen[-1]
    assert len(conversation.tools) == 10 and conversation.builtin[0].name == "python"
    page.driver.refresh()
    page.wait(lambda: len(page.find("#served input:checked")) == 2)
    page.click("#new")
    page.wait(lambda: not page.find("#served input:checked"))
    page.say("another chat")
    assert not page.llm.seen[-1][0].tools


def test_calls_and_results_are_shown_and_sent_again(page: Page) -> None:
    page.llm.write = calls(WEATHER)
    switch(page, BOX)
    page.say("weather?")
    assert last(page) == "It says: sunny in Rome"
    assert last(page, ".call summary") == "Calls get_weather"
    page.click(".turn:last-child .call summary")
    assert "sunny in Rome" in last(page, ".call")
    page.llm.write = calls()
    page.say("thanks")
    roles = [m.role for m in page.llm.seen[-1][0].messages if m.channel != "analysis"]
    assert roles == ["user", "assistant", "tool", "assistant", "user"]
    page.driver.refresh()
    page.wait(lambda: "It says: sunny in Rome" in page.text("#log"))


def test_what_may_change_something_asks(page: Page) -> None:
    page.llm.write = calls(NOTE)
    switch(page, BOX)
    page.say("note it")
    assert "This tool of toy may change something." in last(page, ".call")
    page.click(".call .primary")
    page.wait(lambda: last(page) == "It says: noted: a")
    page.finished()
    page.llm.write = calls()
    page.say("thanks")
    history = page.llm.seen[-1][0].messages
    assert [m.content for m in history if m.role == "tool"] == ["noted: a"], "once"


def test_what_is_refused_is_not_run(page: Page) -> None:
    page.llm.write = calls(NOTE)
    switch(page, BOX)
    page.say("note it")
    page.click(".call .buttons button:not(.primary)")
    page.wait(lambda: "did not allow" in last(page))
    page.finished()
    results = [m.content for m in page.llm.seen[-1][0].messages if m.role == "tool"]
    assert len(results) == 1 and "did not allow" in results[0], "and not what the tool would have said"


@pytest.mark.skipif(not AXE.exists(), reason="`make page` fetches axe-core")
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(page: Page, width: int) -> None:
    page.sizes(width, 844)
    page.llm.write = calls(WEATHER, NOTE)
    page.click("#tune")
    page.click(BOX)
    assert violations(page) == [], "the switches"
    page.press(Keys.ESCAPE)
    page.say("weather, and note it")
    assert violations(page) == [], "a result, and a call to approve"
