"""The page in a browser, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.tools.toolbox import Toolbox
from mlx_gptoss.tokenizer import Tokenizer
from tests.support.scripted_llm import ScriptedLLM, answer
from tests.support.server_help import live

if TYPE_CHECKING:
    from tests.page.browser import Page


@pytest.fixture(scope="module")
def toolbox() -> Toolbox | None:
    """The tools of the server; a module may have its own."""
    return None


@pytest.fixture(scope="module")
def opened(tokenizer: Tokenizer, toolbox: Toolbox | None) -> Iterator[Page]:
    """A browser for the tests of a module."""
    from tests.page.browser import Page, make_driver

    llm = ScriptedLLM(tokenizer)
    driver = make_driver()
    try:
        with live(create_app(llm, ServerSettings(port=0), toolbox)) as url:  # type: ignore[arg-type]
            yield Page(driver, url, llm)
    finally:
        driver.quit()


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """The page, wide and light, in a browser that has kept nothing."""
    opened.llm.write = answer
    opened.llm.seen.clear()
    driver = opened.driver
    driver.get(opened.url + "/static/icon.svg")
    origin = {"origin": opened.url, "storageTypes": "all"}
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", origin)
    opened.js("localStorage.clear(); sessionStorage.clear()")
    opened.sizes(1280, 800)
    opened.scheme("light")
    driver.get_log("browser")
    opened.open()
    opened.wait(lambda: opened.text("#model") == "scripted")
    yield opened
    bad = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not bad, "errors on the page's console"
