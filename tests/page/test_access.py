"""The page for everybody: axe-core finds nothing, and a keyboard alone does everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.page.browser import CONTROL, Keys, Page, scripted
from tests.page.test_chat import RICH, last
from tests.support.scripted_llm import Script, answer

pytest_plugins = ["tests.support.server_fixtures"]
AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with what is shown."""
    page.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text("utf-8")})
    found = page.driver.execute_async_script(
        "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(r => done("
        "r.violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 99)} ${n.failureSummary}`))))"
    )
    return list(found)


@pytest.mark.skipif(not AXE.exists(), reason="`make page` fetches axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(page: Page, width: int, scheme: str) -> None:
    page.sizes(width, 844)
    page.scheme(scheme)
    assert violations(page) == [], "empty"
    calls = [("get_weather", '{"city": "Paris"}')]
    page.llm.write = scripted(Script(text=RICH))
    page.say("rich")
    page.click(".turn:last-child .acts [aria-label=Details]")
    page.js("document.querySelector('.reasoning').open = true")
    assert violations(page) == [], "an answer"
    page.llm.write = scripted(Script(calls=calls))
    page.say("call")
    assert violations(page) == [], "a call"
    page.llm.write = scripted(Script(text="no", fail_after=2))
    page.say("fail")
    page.write("a draft")
    assert violations(page) == [], "a failure"
    if width == 390:
        page.click("#open-side")
        page.wait(lambda: page.one("#close-side").is_displayed())
        assert violations(page) == [], "the drawer"
        page.press(Keys.ESCAPE)
        page.wait(lambda: page.js("return !document.querySelector('#main').inert"))
    for button, dialog in (("tune", "settings"), ("help", "shortcuts")):
        page.js("document.getElementById(arguments[0]).click()", button)
        page.wait(page.one(f"#{dialog}").is_displayed)
        assert violations(page) == [], dialog
        page.press(Keys.ESCAPE)


def test_a_keyboard_alone_does_everything(page: Page) -> None:
    """Every step by keys, from where the focus is."""

    def focused() -> str:
        return str(
            page.js(
                "const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.title"
            )
        )

    def tab_to(name: str, back: bool = False) -> None:
        for _ in range(60):
            if focused() == name:
                return
            page.press(*((Keys.SHIFT, Keys.TAB) if back else (Keys.TAB,)))
        raise AssertionError(f"{name} was not reached")

    page.wait(lambda: focused() == "prompt")
    page.press("first", Keys.ENTER)
    page.wait(lambda: last(page) == "You said: first")
    page.finished()
    assert focused() == "prompt"
    page.press(Keys.ALT, Keys.ARROW_UP)
    page.wait(lambda: focused() == "Edit the message")
    page.press("!", Keys.ENTER)
    page.wait(lambda: last(page) == "You said: first!")
    page.finished()
    page.press(Keys.SHIFT, Keys.ESCAPE)
    assert focused() == "prompt"
    tab_to("Details", back=True)
    page.press(Keys.ENTER)
    assert "complete" in last(page, ".details")
    tab_to("Answer again", back=True)
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".turn:last-child .branch") == "2/2")
    page.finished()
    page.press(Keys.SHIFT, Keys.ESCAPE)
    tab_to("Earlier version", back=True)
    page.press(Keys.ENTER)
    page.wait(lambda: page.text(".turn:last-child .branch") == "1/2")
    assert focused() == "Later version", "the focus stays at the branch"
    page.llm.write = scripted(Script(text="word " * 3000, delay=0.01))
    page.press(CONTROL, Keys.SHIFT, "o")
    page.wait(lambda: not page.find(".turn") and focused() == "prompt")
    page.press("go on", Keys.ENTER)
    page.wait(lambda: "word" in last(page))
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.llm.running[-1].ended.is_set())
    page.finished()
    page.llm.write = answer
    page.press(CONTROL, "k")
    page.wait(lambda: focused() == "search")
    page.press("first")
    page.wait(lambda: page.chats() == ["first"])
    tab_to("first")
    page.press(Keys.ENTER)
    page.wait(lambda: last(page) == "You said: first!")
    page.press(CONTROL, "k")
    tab_to("Actions for first")
    page.press(Keys.ENTER)
    page.wait(
        lambda: page.text("#menu") != "" and page.js("return document.activeElement.textContent") == "Rename"
    )
    page.press(Keys.ENTER)
    page.wait(lambda: focused() == "New name")
    page.press(CONTROL, "a")
    page.press("renamed", Keys.ENTER)
    page.wait(lambda: page.chats() == ["renamed"] or focused() == "renamed")
    page.press(CONTROL, ",")
    page.wait(lambda: page.one("#settings").is_displayed())
    tab_to("set-temperature")
    page.press("0.7", Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.press(CONTROL, "/")
    page.wait(lambda: page.one("#shortcuts").is_displayed())
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.press(CONTROL, Keys.SHIFT, "s")
    page.wait(lambda: page.one("#open-side").is_displayed())


def test_reduced_motion_is_respected_and_every_control_has_a_name(page: Page) -> None:
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    moving = "return [...document.querySelectorAll('*')].filter(e => {const s = getComputedStyle(e);"
    moving += " return s.animationName != 'none' || parseFloat(s.transitionDuration) > 0}).length"
    assert page.js(moving) == 0
    for control in page.find("button, textarea, select, input"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")
