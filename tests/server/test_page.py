"""The chat page in headless Chromium: what a person does with it. Skipped where there is no browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM, answer
from tests.support.server_help import live

webdriver = pytest.importorskip("selenium.webdriver", reason="the page's test needs selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("the page's test needs chromium and chromedriver", allow_module_level=True)

from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytest_plugins = ["tests.support.server_fixtures"]

RICH = """## A heading

Some **bold**, *italic* and `code`, and [a link](https://example.org/x).

- one
- two
  - nested

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>not bold</b>")
```

<img src=x onerror="window.hacked = 1"> [bad](javascript:window.hacked=2) <script>window.hacked = 3</script>
"""


@pytest.fixture(scope="module")
def page(tokenizer: Tokenizer) -> Iterator[tuple[Any, ScriptedLLM]]:
    """The page, open in a browser, and the LLM behind it."""
    llm = ScriptedLLM(tokenizer)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        with live(create_app(llm, ServerSettings(port=0))) as url:  # type: ignore[arg-type]
            driver.get(url)
            yield driver, llm
            bad = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
            assert not bad, "errors on the page's console"
    finally:
        driver.quit()


def wait(driver: Any, true: Any) -> Any:
    # A turn is drawn anew with each piece of its answer, so what was found may be gone a moment later.
    gone = [StaleElementReferenceException]
    return WebDriverWait(driver, 20, 0.05, ignored_exceptions=gone).until(lambda _: true())


def find(driver: Any, selector: str) -> list[Any]:
    return list(driver.find_elements(By.CSS_SELECTOR, selector))


def say(driver: Any, text: str) -> None:
    """Type a message and press Enter; waits for the answer's end."""
    before = len(find(driver, ".turn.assistant"))
    driver.find_element(By.ID, "prompt").send_keys(text, Keys.ENTER)
    wait(driver, lambda: len(find(driver, ".turn.assistant")) == before + 1)
    finished(driver)


def finished(driver: Any) -> None:
    wait(driver, lambda: not driver.find_element(By.ID, "stop").is_displayed())


def last(driver: Any, selector: str = ".body") -> Any:
    return find(driver, f".turn.assistant:last-child {selector}")[0]


@pytest.fixture(autouse=True)
def fresh(page: tuple[Any, ScriptedLLM]) -> None:
    """Every test begins with a conversation of its own."""
    driver, llm = page
    llm.write = answer
    driver.find_element(By.ID, "new").click()


def test_an_answer_is_shown_with_its_reasoning_folded(page: tuple[Any, ScriptedLLM]) -> None:
    driver, llm = page
    wait(driver, lambda: driver.find_element(By.ID, "model").text == "scripted")
    driver.find_element(By.CSS_SELECTOR, "#system-box summary").click()
    system = driver.find_element(By.ID, "system")
    system.clear()
    system.send_keys("Be brief.")
    driver.find_element(By.CSS_SELECTOR, "#effort option:first-child").click()
    say(driver, "hello")
    assert last(driver).text == "You said: hello"
    reasoning = last(driver, "details.reasoning")
    assert reasoning.get_attribute("open") is None
    assert reasoning.find_element(By.TAG_NAME, "summary").text.startswith("Reasoned")
    conversation = llm.seen[-1][0]
    assert (conversation.instructions, conversation.reasoning_effort) == ("Be brief.", "low")
    assert "of 4,096 tokens" in driver.find_element(By.ID, "context").text
    assert "tokens/s" in driver.find_element(By.ID, "speed").text


def test_markdown_is_shown_and_nothing_in_it_runs(page: tuple[Any, ScriptedLLM]) -> None:
    driver, llm = page
    llm.write = lambda *_: Script(reasoning="<b>x</b>", text=RICH)
    say(driver, "<img src=x onerror='window.hacked=4'>")
    body = last(driver)
    for selector, text in {
        "h4": "A heading",
        "strong": "bold",
        "em": "italic",
        "ul ul li": "nested",
        "td": "1",
        "pre code": 'print("<b>not bold</b>")',
    }.items():
        assert body.find_element(By.CSS_SELECTOR, selector).text == text
    links = [a.get_attribute("href") for a in body.find_elements(By.TAG_NAME, "a")]
    assert links == ["https://example.org/x"]
    assert not find(driver, "#log img, #log script, #log b")
    assert driver.execute_script("return window.hacked") is None
    if folder := os.environ.get("GPTOSS_SCREENSHOTS"):
        driver.save_screenshot(str(Path(folder) / "light.png"))
        driver.execute_script("document.documentElement.dataset.theme = 'dark'")
        driver.save_screenshot(str(Path(folder) / "dark.png"))


def test_a_long_answer_can_be_stopped_and_made_again(page: tuple[Any, ScriptedLLM]) -> None:
    driver, llm = page
    llm.write = lambda *_: Script(text="word " * 4000, delay=0.01)
    driver.find_element(By.ID, "prompt").send_keys("go on", Keys.ENTER)
    wait(driver, lambda: find(driver, ".turn.assistant") and "word" in last(driver).text)
    driver.find_element(By.ID, "stop").click()
    wait(driver, lambda: llm.running[-1].ended.is_set())
    llm.write = answer
    wait(driver, lambda: find(driver, ".again"))
    last(driver, ".again").click()
    wait(driver, lambda: last(driver).text == "You said: go on")
    finished(driver)
    assert len(find(driver, ".turn")) == 2


def test_editing_a_message_rewinds_to_it(page: tuple[Any, ScriptedLLM]) -> None:
    driver, llm = page
    say(driver, "first")
    say(driver, "second")
    assert len(find(driver, ".turn")) == 4
    find(driver, ".turn.user .acts button")[0].click()
    prompt = driver.find_element(By.ID, "prompt")
    assert prompt.get_attribute("value") == "first"
    assert len(find(driver, ".turn")) == 0
    say(driver, " again")
    assert [m.content for m in llm.seen[-1][0].messages] == ["first again"]


def test_tool_calls_are_shown(page: tuple[Any, ScriptedLLM]) -> None:
    driver, llm = page
    llm.write = lambda *_: Script(calls=[("get_weather", '{"city": "Paris"}')])
    say(driver, "weather?")
    assert last(driver, "details.call summary").text == "Calls get_weather"
    assert last(driver, "details.call code").text == '{"city": "Paris"}'


def test_errors_are_told(page: tuple[Any, ScriptedLLM]) -> None:
    driver, llm = page
    llm.write = lambda *_: Script(text="never shown in full", fail_after=6)
    say(driver, "hm")
    assert last(driver, ".error").text == "the engine failed"


def test_conversations_stay_in_the_browser(page: tuple[Any, ScriptedLLM]) -> None:
    driver, _ = page
    say(driver, "remember me")
    driver.refresh()
    wait(driver, lambda: find(driver, ".turn.assistant"))
    assert last(driver).text == "You said: remember me"
    names = [button.text for button in find(driver, "#list button:first-child")]
    assert "remember me" in names
    find(driver, "#list button:last-child")[0].click()
    assert "remember me" not in [button.text for button in find(driver, "#list button:first-child")]


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(page: tuple[Any, ScriptedLLM]) -> None:
    driver, _ = page
    for control in find(driver, "button, textarea, select"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute("outerHTML")
    driver.execute_script("document.activeElement.blur(); document.body.focus()")
    reached = set()
    for _ in range(50):  # past the list of conversations
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(driver.switch_to.active_element.get_attribute("id"))
    assert {"new", "theme", "effort", "prompt", "send"} <= reached
    driver.find_element(By.ID, "theme").click()
    assert driver.find_element(By.ID, "theme").text == "Theme: light"
    assert driver.execute_script("return document.documentElement.dataset.theme") == "light"
