"""Pictures of the chat page, in docs/images.

    python -m scripts.screenshots [--all FOLDER] [--url http://127.0.0.1:8000]

Without options it draws the pictures of README and docs again, from the answers that are written below. --all
draws every scene in every width and colour scheme into a folder, to be looked at. It needs chromium,
chromedriver and the dev extra.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_gptoss.harmony import Conversation
from mlx_gptoss.sampling import PromptProgress
from mlx_gptoss.server import ServerSettings, create_app
from tests.page.browser import Keys, Page, make_driver
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM
from tests.support.server_help import live

IMAGES = Path(__file__).parent.parent / "docs/images"
MAX_BYTES = 200_000
WIDE, PHONE = (1280, 800), (390, 844)

SORTING = r"""Both sort \(n\) items, but they scale very differently:

| | Insertion sort | Merge sort |
|---|---|---|
| Worst case | \(O(n^2)\) | \(O(n \log n)\) |
| Already sorted | \(O(n)\) | \(O(n \log n)\) |
| Extra memory | \(O(1)\) | \(O(n)\) |
| Stable | yes | yes |

Merge sort's cost follows from its recurrence:

\[
T(n) = 2\,T\!\left(\frac{n}{2}\right) + n \quad\Rightarrow\quad T(n) = n \log_2 n + O(n)
\]

In Python:

```python
def merge_sort(items: list[int]) -> list[int]:
    if len(items) < 2:
        return items
    middle = len(items) // 2
    left, right = merge_sort(items[:middle]), merge_sort(items[middle:])
    merged = []
    while left and right:
        merged.append((left if left[0] <= right[0] else right).pop(0))
    return merged + left + right
```

For fewer than about 30 items **insertion sort wins**: it moves little and needs no memory. That is why
library sorts switch to it for short runs.
"""
WHICH = r"""Use `sorted`, unless you are learning. It is *Timsort*: it finds runs that are already in order,
extends short ones with insertion sort, and merges them.

1. It is stable, so you can sort by one key and then by another.
2. On sorted input it needs \(n - 1\) comparisons.
3. It is written in C.

> Measure before you replace it; `python -m timeit` takes a minute.
"""
ASKED = {
    "Compare insertion sort and merge sort": Script(
        reasoning="The user wants a comparison of two sorting algorithms. A table of costs would be the "
        "clearest, then the recurrence for merge sort, and a short implementation. I should mention where "
        "insertion sort is the better choice.",
        text=SORTING,
    ),
    "Which of them should I use in practice?": Script(reasoning="Timsort, then.", text=WHICH),
    "What is the weather in Oslo?": Script(
        reasoning="I need the weather for Oslo; there is a tool for that.",
        calls=[("get_weather", '{"city": "Oslo", "unit": "celsius"}')],
    ),
    "Summarise the report": Script(
        reasoning="The report has four sections. Let me go through them: the first is about the budget, "
        "which grew by a tenth. The second lists what was delivered and what was not, and why. The third",
        text="x" * 400,
        delay=0.1,
    ),
    "Read it all": Script(text="x", reads=[PromptProgress(18_432, 0, 52_310)], pause=60),
}
BEFORE = [
    "Plan a week of dinners",
    "Regex for ISO dates",
    "Explain the CAP theorem",
    "Names for a sailing boat",
]


def answers(conversation: Conversation, options: dict[str, Any]) -> Script:
    """What is written above, or a few words."""
    last = conversation.messages[-1]
    script = ASKED.get(last.content, Script(text="Gladly. Here is a first draft."))
    if last.role == "tool":
        text = "It is **12 °C** in Oslo and cloudy, with light rain in the evening."
        script = Script(reasoning="Mild.", text=text)
    return replace(script, delay=script.delay or 0.01)  # the speed of a laptop


def ask(page: Page, text: str) -> None:
    """Send a message; the answer may go on."""
    page.write(text)
    page.click("#send:enabled")
    page.wait(lambda: page.find(".turn.assistant:last-child"))


def ask_all(page: Page, *texts: str) -> None:
    """Send messages and wait for their answers."""
    for text in texts:
        page.say(text)


def empty(page: Page) -> None:
    """A new chat."""
    page.press(Keys.NULL)


def long_chat(page: Page) -> None:
    """Table, formulas and code, from the top."""
    ask_all(page, *list(ASKED)[:2])
    page.js("document.querySelector('#scroll').scrollTop = 0")


def chat_end(page: Page) -> None:
    """The same at its end."""
    ask_all(page, *list(ASKED)[:2])


def reasoning(page: Page) -> None:
    """Reasoning as it streams."""
    ask(page, "Summarise the report")
    page.wait(lambda: len(page.text(".thoughts")) > 150)


def reading(page: Page) -> None:
    """A long prompt that is being read."""
    ask(page, "Read it all")
    page.wait(lambda: page.text(".wait"))


def tools(page: Page) -> None:
    """A call with its result."""
    page.js(
        "const e = document.querySelector('#set-tools'); e.value = arguments[0];"
        "e.dispatchEvent(new Event('change'))",
        '[{"name": "get_weather", "parameters": {"type": "object"}}]',
    )
    ask(page, "What is the weather in Oslo?")
    page.one(".call textarea").send_keys('{"degrees": 12, "sky": "cloudy"}')
    page.click(".call .primary")
    page.wait(lambda: len(page.find(".turn.assistant")) == 2)
    page.finished()
    page.click(".call summary")


def waiting(page: Page) -> None:
    """A call that waits for its result."""
    tools(page)
    ask(page, "What is the weather in Oslo?")
    page.wait(lambda: page.find(".call textarea"))


def settings(page: Page) -> None:
    """The drawer."""
    page.say("Which of them should I use in practice?")
    page.js("document.querySelector('#tune').click()")
    page.one("#set-instructions").send_keys("Answer briefly, in plain words.")


def sidebar(page: Page) -> None:
    """The list of chats with a menu."""
    page.say("Which of them should I use in practice?")
    if page.js("return innerWidth < 800"):
        page.click("#open-side")
        page.wait(lambda: page.js("return document.querySelector('#sidebar').getBoundingClientRect().x") == 0)
    page.js("document.querySelector('#list li:nth-child(2) button').click()")


def edit(page: Page) -> None:
    """A message that is being edited, above an answer with two versions."""
    ask_all(page, "Plan a week of dinners", "Which of them should I use in practice?")
    page.click(".turn:last-child [aria-label='Answer again']")
    page.finished()
    page.press(Keys.ALT, Keys.ARROW_UP)
    page.wait(lambda: page.find(".editor"))


def cut_off(page: Page) -> None:
    """An answer at its limit, and one that failed."""
    page.llm.write = lambda *_: Script(text="Once upon a time", finish_reason="length")
    page.say("Tell me a story")
    page.llm.write = lambda *_: Script(text="no", fail_after=1)
    page.say("And then?")
    page.js("document.querySelector('.acts [aria-label=Details]').click()")
    page.llm.write = answers


def shortcuts(page: Page) -> None:
    """The sheet."""
    page.press(Keys.CONTROL, "/")
    page.wait(lambda: page.find("#shortcuts[open]"))


SCENES: tuple[Callable[[Page], None], ...] = (
    empty,
    long_chat,
    chat_end,
    reasoning,
    reading,
    tools,
    waiting,
    settings,
    sidebar,
    edit,
    cut_off,
    shortcuts,
)
CHOSEN = (
    ("page", long_chat, WIDE, "light", 2),
    ("page-dark", tools, WIDE, "dark", 2),
    ("page-phone", chat_end, PHONE, "light", 2),
)


@contextmanager
def opened(url: str | None) -> Iterator[tuple[Page, Path]]:
    """The page in a browser, with a server behind it, which is ours without a URL; and older chats."""
    with tempfile.TemporaryDirectory() as folder:
        llm = ScriptedLLM(byte_tokenizer(Path(folder)), answers, max_context=131_072)
        app = create_app(llm, ServerSettings(port=0, model_name="gpt-oss-20b"))  # type: ignore[arg-type]
        with live(app) as own:
            driver = make_driver()
            try:
                yield Page(driver, url or own, llm), write_chats(Path(folder) / "chats.json")
            finally:
                driver.quit()


def write_chats(path: Path) -> Path:
    """A file with some older chats, to be imported."""
    now = time.time() * 1000
    chats = [
        {"conversation": {"id": f"{n}", "title": title, "updated": now - n * 20 * 3_600_000}, "messages": []}
        for n, title in enumerate(BEFORE)
    ]
    path.write_text(json.dumps({"format": "mlx-gptoss-chats", "version": 1, "chats": chats}))
    return path


def fresh(page: Page, before: Path, size: tuple[int, int], scheme: str, scale: int) -> None:
    """A browser that has kept a few chats."""
    page.driver.get(page.url + "/static/icon.svg")
    page.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": page.url, "storageTypes": "all"})
    page.js("localStorage.clear()")
    page.sizes(*size, scale=scale)
    page.scheme(scheme)
    page.open()
    page.wait(lambda: page.find("[data-server=ready]"))
    page.one("#import-file").send_keys(str(before))
    page.wait(lambda: len(page.chats()) == len(BEFORE))
    page.js("document.querySelectorAll('.toast').forEach(note => note.remove())")


def picture(page: Page, path: Path) -> None:
    """What is on the screen, as a PNG of 256 colours."""
    moving = "document.getAnimations().filter(one => one instanceof CSSTransition)"
    page.wait(lambda: page.js(f"return {moving}.length") == 0)
    image = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    parser.add_argument("--url", help="a running server in place of the scripted one")
    options = parser.parse_args()
    with opened(options.url) as (page, before):
        if options.all:
            options.all.mkdir(parents=True, exist_ok=True)
            for scene in SCENES:
                for (width, height), scheme in ((s, c) for s in (WIDE, PHONE) for c in ("light", "dark")):
                    fresh(page, before, (width, height), scheme, 1)
                    scene(page)
                    picture(page, options.all / f"{scene.__name__}-{width}-{scheme}.png")
            return
        IMAGES.mkdir(exist_ok=True)
        for name, scene, size, scheme, scale in CHOSEN:
            fresh(page, before, size, scheme, scale)
            scene(page)
            path = IMAGES / f"{name}.png"
            picture(page, path)
            assert path.stat().st_size < MAX_BYTES, f"{path} is larger than {MAX_BYTES} bytes"


if __name__ == "__main__":
    main()
