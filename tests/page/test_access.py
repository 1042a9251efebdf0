"""The page for everybody: axe-core finds nothing, nothing moves that should not, and the key is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_gptoss.server import ServerSettings, create_app
from tests.page.browser import Keys, Page, scripted
from tests.page.test_chat import RICH, last
from tests.support.scripted_llm import Script
from tests.support.server_help import live

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


def test_reduced_motion_is_respected_and_every_control_has_a_name(page: Page) -> None:
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    moving = "return [...document.querySelectorAll('*')].filter(e => {const s = getComputedStyle(e);"
    moving += " return s.animationName != 'none' || parseFloat(s.transitionDuration) > 0}).length"
    assert page.js(moving) == 0
    for control in page.find("button, textarea, select, input"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")


def test_the_key_comes_from_the_fragment_or_is_asked_for(page: Page) -> None:
    stored = "return [localStorage['gptoss.key'] ?? null, sessionStorage['gptoss.key'] ?? null]"
    app = create_app(page.llm, ServerSettings(port=0, api_key="secret word"))  # type: ignore[arg-type]
    with live(app) as url:
        guarded = Page(page.driver, url, page.llm)
        guarded.open("/#key=secret%20word")
        guarded.wait(lambda: guarded.text("#model") == "scripted")
        assert "secret" not in guarded.driver.current_url and "secret" not in guarded.js(
            "return document.body.innerHTML"
        )
        guarded.say("hello")
        assert last(guarded) == "You said: hello"
        guarded.js("localStorage.clear()")
        guarded.open()
        guarded.wait(lambda: guarded.find("#key-dialog[open]"))
        guarded.press("wrong", Keys.ENTER)
        guarded.wait(lambda: guarded.js("return document.querySelector('#key').value") == "")
        guarded.wait(lambda: guarded.find("#key-dialog[open]"))
        guarded.press("secret word", Keys.TAB, Keys.SPACE)  # not to be kept
        guarded.press(Keys.TAB, Keys.ENTER)
        guarded.wait(lambda: guarded.text("#model") == "scripted")
        assert guarded.js(stored) == [None, "secret word"]
    page.driver.get_log("browser")  # the refusals are told there
