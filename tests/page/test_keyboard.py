"""A keyboard alone does everything: every step by keys, from where the focus is."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.common.exceptions import TimeoutException

from tests.page.browser import CONTROL, Keys, Page, scripted
from tests.page.test_chat import last
from tests.support.scripted_llm import Script, answer

pytest_plugins = ["tests.support.server_fixtures"]


def focused(page: Page) -> str:
    """What has the focus: its id, or what it is called."""
    name = "return e.id || e.getAttribute('aria-label') || e.title || e.textContent"
    return str(page.js(f"const e = document.activeElement; {name}"))


def tab_to(page: Page, name: str, back: bool = False) -> None:
    for _ in range(80):
        if focused(page) == name:
            return
        page.press(*((Keys.SHIFT, Keys.TAB) if back else (Keys.TAB,)))
    raise AssertionError(f"{name} was not reached")


def choose(page: Page, title: str, item: str) -> None:
    """An action of a chat from its menu in the sidebar."""
    page.press(CONTROL, "k")
    page.wait(lambda: focused(page) == "search")
    tab_to(page, f"Actions for {title}")
    page.press(Keys.ENTER)
    page.wait(lambda: focused(page) == "Rename")
    tab_to(page, item)
    page.press(Keys.ENTER)
    try:
        page.wait(lambda: not page.find("#menu:popover-open"), seconds=10)
    except TimeoutException:  # the browser was too busy for the key
        page.press(Keys.ENTER)
        page.wait(lambda: not page.find("#menu:popover-open"))


@pytest.fixture
def two(page: Page) -> Page:
    """The page with two chats, written by keys; the second is shown."""
    page.wait(lambda: focused(page) == "prompt")
    page.press("first", Keys.ENTER)
    page.wait(lambda: last(page) == "You said: first")
    page.finished()
    assert focused(page) == "prompt"
    page.press(CONTROL, Keys.SHIFT, "o")
    page.wait(lambda: not page.find(".turn") and focused(page) == "prompt")
    page.press("second", Keys.ENTER)
    page.wait(lambda: last(page) == "You said: second")
    page.finished()
    page.wait(lambda: page.chats() == ["second", "first"])
    return page


def test_messages_are_edited_answered_again_and_their_branches_walked(two: Page) -> None:
    page = two
    page.press(Keys.ALT, Keys.ARROW_UP)
    page.wait(lambda: focused(page) == "Edit the message")
    page.press("!", Keys.ESCAPE)
    page.wait(lambda: focused(page) == "Edit")
    page.press(Keys.ENTER)
    page.wait(lambda: focused(page) == "Edit the message")
    page.press("?", Keys.ENTER)
    page.wait(lambda: last(page) == "You said: second?")
    page.finished()
    page.press(Keys.SHIFT, Keys.ESCAPE)
    assert focused(page) == "prompt"
    tab_to(page, "Details", back=True)
    page.press(Keys.ENTER)
    assert "complete" in last(page, ".details")
    tab_to(page, "Answer again", back=True)
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".turn:last-child .branch") == "2/2")
    page.finished()
    page.press(Keys.SHIFT, Keys.ESCAPE)
    tab_to(page, "Earlier version", back=True)
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".turn:last-child .branch") == "1/2")
    assert focused(page) == "Later version", "the focus stays at the branch"
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".turn:last-child .branch") == "2/2")
    tab_to(page, "Earlier version", back=True)  # of the answer
    page.press(Keys.SHIFT, Keys.TAB)
    tab_to(page, "Earlier version", back=True)  # of the question
    page.press(Keys.ENTER)
    page.wait(lambda: last(page) == "You said: second")


def test_an_answer_is_stopped(two: Page) -> None:
    page = two
    page.llm.write = scripted(Script(text="word " * 3000, delay=0.01))
    for stop in (Keys.ESCAPE, None):
        page.press("go on", Keys.ENTER)
        page.wait(lambda: "word" in last(page))
        if stop:
            page.press(stop)
        else:
            tab_to(page, "stop")
            page.press(Keys.ENTER)
        page.wait(lambda: page.llm.running[-1].ended.is_set())
        page.finished()
        page.wait(lambda: focused(page) == "prompt")


def test_chats_are_found_renamed_deleted_and_brought_back(two: Page) -> None:
    page = two
    page.press(CONTROL, "k")
    page.wait(lambda: focused(page) == "search")
    page.press("first")
    page.wait(lambda: page.chats() == ["first"])
    tab_to(page, "first")
    page.press(Keys.ENTER)
    page.wait(lambda: last(page) == "You said: first")
    page.press(CONTROL, "k")
    page.press(Keys.ESCAPE)
    page.wait(lambda: len(page.chats()) == 2)
    choose(page, "first", "Rename")
    page.wait(lambda: focused(page) == "New name")
    page.press(CONTROL, "a")
    page.press("renamed", Keys.ENTER)
    page.wait(lambda: sorted(page.chats()) == ["renamed", "second"])
    page.wait(lambda: focused(page) == "renamed")
    choose(page, "second", "Delete")
    page.wait(lambda: page.chats() == ["renamed"])
    page.wait(lambda: focused(page) == "renamed")  # its neighbour
    page.press(CONTROL, Keys.SHIFT, "z")
    page.wait(lambda: len(page.chats()) == 2 and last(page) == "You said: second")
    choose(page, "second", "Delete")  # the one that is shown
    page.wait(lambda: page.chats() == ["renamed"] and not page.find(".turn"))
    tab_to(page, "Undo")
    page.press(Keys.ENTER)
    page.wait(lambda: len(page.chats()) == 2 and last(page) == "You said: second")


def test_chats_are_exported_and_imported(two: Page, tmp_path: Path) -> None:
    page = two
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    choose(page, "second", "Export as Markdown")
    page.wait((tmp_path / "second.md").exists)
    choose(page, "second", "Export as JSON")
    page.wait((tmp_path / "second.json").exists)
    page.press(CONTROL, ",")
    page.wait(lambda: page.one("#settings").is_displayed())
    tab_to(page, "export-all")
    page.press(Keys.ENTER)
    page.wait((tmp_path / "chats.json").exists)
    page.driver.execute_cdp_cmd("Page.setInterceptFileChooserDialog", {"enabled": True})
    page.js("document.querySelector('#import-file').addEventListener('click', () => { window.asked = true })")
    tab_to(page, "import")
    page.press(Keys.ENTER)
    assert page.js("return window.asked"), "the browser asks for the file"
    page.driver.execute_cdp_cmd("Page.setInterceptFileChooserDialog", {"enabled": False})
    page.press(Keys.ESCAPE)
    choose(page, "second", "Delete")
    page.wait(lambda: page.chats() == ["first"])
    page.one("#import-file").send_keys(str(tmp_path / "chats.json"))
    page.wait(lambda: sorted(page.chats()) == ["first", "second"])


@pytest.mark.parametrize("name", ["Actions for second", "second"])
def test_the_list_drawn_anew_leaves_the_focus_where_it_was(two: Page, name: str) -> None:
    page = two
    page.press(CONTROL, "k")
    page.wait(lambda: focused(page) == "search")
    tab_to(page, name)
    page.js("window.was = document.activeElement")
    source = page.js("return document.querySelector('script[type=module][src]').src")
    page.js("import(new URL('sidebar.js', arguments[0])).then((sidebar) => sidebar.drawSoon())", source)
    page.wait(lambda: page.js("return !window.was.isConnected"))
    page.wait(lambda: focused(page) == name)


def test_settings_sheet_and_sidebar_open_and_close(two: Page) -> None:
    page = two
    page.press(CONTROL, ",")
    page.wait(lambda: page.one("#settings").is_displayed())
    tab_to(page, "set-temperature")
    page.press("0.7", Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.press(Keys.SHIFT, Keys.ESCAPE)
    tab_to(page, "effort")
    page.press(Keys.ARROW_UP)
    page.press(Keys.SHIFT, Keys.ESCAPE)
    page.press("third", Keys.ENTER)
    page.wait(lambda: last(page) == "You said: third")
    page.finished()
    conversation, options = page.llm.seen[-1]
    assert options["params"].temperature == 0.7 and conversation.reasoning_effort == "low"
    page.press(CONTROL, "/")
    page.wait(lambda: page.one("#shortcuts").is_displayed())
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    for _ in range(2):
        page.press(CONTROL, Keys.SHIFT, "s")
        page.wait(lambda: page.one("#open-side").is_displayed())
        page.press(CONTROL, Keys.SHIFT, "s")
        page.wait(lambda: page.one("#close-side").is_displayed())


def test_the_results_of_calls_are_given_and_code_is_copied(two: Page) -> None:
    page = two
    page.llm.write = scripted(Script(calls=[("get_weather", "{}")]))
    page.press("weather?", Keys.ENTER)
    page.wait(lambda: page.find(".call textarea"))
    page.llm.write = scripted(Script(text="```python\nx = 1\n```"))
    tab_to(page, "Result of get_weather", back=True)
    page.press("12", Keys.TAB, Keys.ENTER)
    page.wait(lambda: last(page, "pre") == "x = 1\n")
    page.finished()
    page.js(
        "document.addEventListener('copy', () => { window.copied = String(getSelection()) ||"
        " document.activeElement.value }); Object.defineProperty(navigator, 'clipboard', {value: undefined})"
    )
    page.press(Keys.SHIFT, Keys.ESCAPE)
    tab_to(page, "Copy code", back=True)
    page.press(Keys.ENTER)
    page.wait(lambda: page.js("return window.copied") == "x = 1\n")
    page.llm.write = answer
