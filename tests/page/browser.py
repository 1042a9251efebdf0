"""A browser with the page open, and the scripted LLM behind it. Skipped where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.scripted_llm import Script, ScriptedLLM, Write

webdriver = pytest.importorskip("selenium.webdriver", reason="the page's tests need selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("the page's tests need chromium and chromedriver", allow_module_level=True)

from selenium.common.exceptions import (  # noqa: E402
    ElementNotInteractableException,
    JavascriptException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CONTROL = Keys.CONTROL
__all__ = ["CONTROL", "Keys", "Page", "TimeoutException", "make_driver", "scripted"]


def make_driver() -> Any:
    """A headless Chromium; `quit` it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(DRIVER))


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, driver: Any, url: str, llm: ScriptedLLM | None = None) -> None:
        self.driver = driver
        self.url = url
        self._llm = llm

    @property
    def llm(self) -> ScriptedLLM:
        """The LLM behind it, where that runs in this process."""
        assert self._llm is not None
        return self._llm

    def open(self, path: str = "/") -> None:
        """Load it anew. Only the fragment changing would load nothing."""
        self.driver.get("about:blank")
        self.driver.get(self.url + path)
        self.wait(lambda: self.js("return location.hash.startsWith('#/')"))
        self.wait(lambda: self.find("#prompt"))

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, true: Callable[[], Any], seconds: float = 60) -> Any:
        # Elements are drawn anew as an answer grows, so what was found may be gone a moment later.
        gone = [
            StaleElementReferenceException,
            IndexError,
            ElementNotInteractableException,
            JavascriptException,
        ]
        return WebDriverWait(self.driver, seconds, 0.03, ignored_exceptions=gone).until(lambda _: true())

    def find(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.wait(lambda: self.find(selector)[0])

    def text(self, selector: str) -> str:
        """The text of the last element that matches, as it is shown."""
        return str(
            self.js("return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText ?? ''", selector)
        )

    def click(self, selector: str) -> None:
        self.wait(lambda: (self.find(selector)[-1].click(), True)[1])

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        self.wait(lambda: (self.driver.switch_to.active_element.send_keys(*keys), True)[1])

    def write(self, text: str) -> None:
        self.one("#prompt").send_keys(text)

    def say(self, text: str) -> None:
        """Send a message, and wait for the answer's end."""
        count = len(self.find(".turn.assistant"))
        self.write(text)
        self.click("#send:enabled")
        self.wait(lambda: len(self.find(".turn.assistant")) > count)
        self.finished()

    def finished(self) -> None:
        """Wait until the answer that is shown has ended and is rendered."""
        self.wait(lambda: self.find(".turn.assistant[aria-busy=false]") and not self.find("[aria-busy=true]"))
        self.wait(
            lambda: self.js(
                "return [...document.querySelectorAll('.turn.assistant')].every(turn =>"
                " turn.querySelector('.block, .call, .failure:not(:empty)'))"
            )
        )

    def chats(self) -> list[str]:
        """The titles in the sidebar."""
        return list(self.js("return [...document.querySelectorAll('#list a')].map(link => link.title)"))

    def sizes(self, width: int, height: int, scale: int = 1) -> None:
        """The window's, in CSS pixels; narrow ones are phones."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 600})

    def scheme(self, name: str) -> None:
        """light or dark"""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def scripted(script: Script) -> Write:
    """An LLM that always answers this."""
    return lambda *_: script
