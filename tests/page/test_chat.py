"""The chat page in a browser: what a person does with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.page.browser import CONTROL, Keys, Page, scripted
from tests.support.scripted_llm import Script, answer

pytest_plugins = ["tests.support.server_fixtures"]

RICH = r"""## A heading

Some **bold**, _italic_, ***both*** and `code`, and [a link](https://example.org/x).

- one
  - nested
- [x] done

| a | b |
|---|---|
| 1<br>2 | \(x^2\) |

```python
print("<b>not bold</b>")
```

\[
\frac{a}{b}
\]

A note.[^1]

[^1]: The note.

<img src=x onerror="window.hacked = 1"> [bad](javascript:window.hacked=2) <script>window.hacked = 3</script>
"""


def last(page: Page, selector: str = ".body") -> str:
    return page.text(f".turn.assistant:last-child {selector}")


def test_an_answer_comes_with_its_reasoning_folded_and_its_details(page: Page) -> None:
    # Not all at once: of an answer that comes in one piece there is no speed to tell.
    page.llm.write = scripted(Script(text="You said: hello", delay=0.1))
    page.say("hello")
    assert last(page) == "You said: hello"
    assert not page.find(".turn details.reasoning[open]")
    assert last(page, "details.reasoning summary").startswith("Thought for")
    page.click(".turn:last-child .acts [aria-label=Details]")
    details = last(page, ".details")
    for name in (
        "Model\nscripted",
        "Tokens\n",
        "tokens/s",
        "First token after\n",
        "from the cache",
        "complete",
    ):
        assert name in details
    page.wait(lambda: "of 4,096 tokens of context used" in page.text("#context"))


def test_markdown_is_drawn_and_nothing_in_it_runs(page: Page) -> None:
    page.llm.write = scripted(Script(reasoning="<b>x</b>", text=RICH))
    page.say("<img src=x onerror='window.hacked=4'>")
    for selector, text in {
        "h3": "A heading",
        "em strong": "both",
        "ul ul li": "nested",
        "td": "1\n2",
        "figcaption span": "python",
        "pre code": 'print("<b>not bold</b>")\n',
        ".footnotes li": "The note. ↩",
    }.items():
        assert page.js("return document.querySelector(arguments[0]).innerText", f".body {selector}") == text
    assert page.js("return document.querySelectorAll('.body math mfrac').length") == 1
    assert page.js("return document.querySelector('.body mfrac').getBoundingClientRect().height") > 20
    assert not page.find("#log img, #log script, #log b")
    assert page.js("return window.hacked") is None
    blocked = "try { document.body.innerHTML = '<b>x</b>'; return 'set' } catch (error) { return error.name }"
    assert page.js(blocked) == "TypeError", "no other code may make HTML of a text"
    assert "TrustedHTML" in page.driver.get_log("browser")[0]["message"]
    assert page.js(
        "return performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))"
    )


def test_code_is_copied_also_without_https(page: Page) -> None:
    page.llm.write = scripted(Script(text="```js\nlet a = 1;\n```"))
    page.say("code")
    page.js("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.js(
        "document.addEventListener('copy', () => { window.copied = getSelection().toString() ||"
        " document.activeElement.value })"
    )
    page.click(".code button")
    assert page.js("return window.copied") == "let a = 1;\n"
    assert "Copied" in page.text(".code button")
    page.click(".turn:last-child [aria-label=Copy]")
    assert page.js("return window.copied") == "```js\nlet a = 1;\n```"


def test_a_long_answer_can_be_stopped_and_made_again(page: Page) -> None:
    page.llm.write = scripted(Script(text="word " * 4000, delay=0.01))
    page.write("go on" + Keys.ENTER)
    page.wait(lambda: "word" in last(page))
    assert not page.one("#send").is_displayed()
    page.click("#stop")
    page.wait(lambda: page.llm.running[-1].ended.is_set())
    page.finished()
    assert "word" in last(page)
    page.llm.write = answer
    page.click(".turn:last-child [aria-label='Answer again']")
    page.wait(lambda: last(page) == "You said: go on")
    page.finished()
    assert page.text(".turn:last-child .branch") == "2/2"
    page.click(".turn:last-child [aria-label='Earlier version']")
    page.wait(lambda: "word" in last(page))


def test_an_edit_begins_a_branch_and_keeps_the_other(page: Page) -> None:
    page.say("first")
    page.say("second")
    page.driver.execute_script("document.querySelector('.turn.user [aria-label=Edit]').click()")
    field = page.one(".editor textarea")
    assert field.get_attribute("value") == "first"
    field.send_keys(" again")
    page.driver.refresh()
    field = page.one(".editor textarea")
    assert field.get_attribute("value") == "first again", "an edit outlives a reload"
    field.send_keys(Keys.ENTER)
    page.wait(lambda: last(page) == "You said: first again")
    page.finished()
    assert [m.content for m in page.llm.seen[-1][0].messages] == ["first again"]
    assert len(page.find(".turn")) == 2
    page.driver.execute_script("document.querySelector('[aria-label=\"Earlier version\"]').click()")
    page.wait(lambda: last(page) == "You said: second")
    assert len(page.find(".turn")) == 4
    assert page.js("return document.querySelector('.branch').innerText") == "1/2"


def test_switching_lets_an_answer_go_on(page: Page) -> None:
    page.llm.write = scripted(Script(text="word " * 100, delay=0.01))
    page.write("long" + Keys.ENTER)
    page.wait(lambda: "word" in last(page))
    page.click("#new")
    page.wait(lambda: not page.find(".turn"))
    page.llm.write = answer
    page.say("meanwhile")
    page.wait(lambda: page.llm.running[0].ended.is_set())
    page.wait(lambda: page.chats()[:2] and "long" in page.chats())
    page.click("#list a[title=long]")
    page.wait(lambda: last(page).count("word") == 100)
    page.finished()
    assert not page.find(".failure:not(:empty)")


def test_a_reload_keeps_what_an_answer_had_and_offers_a_retry(page: Page) -> None:
    page.llm.write = scripted(Script(text="word " * 2000, delay=0.01))
    page.write("long" + Keys.ENTER)
    page.wait(lambda: last(page).count("word") > 60)
    page.driver.refresh()
    page.wait(lambda: "closed or reloaded" in last(page, ".failure p"))
    page.wait(lambda: last(page).count("word") >= 20)
    page.llm.write = answer
    page.click(".failure button")
    page.wait(lambda: last(page) == "You said: long")


def test_drafts_and_settings_outlive_a_reload(page: Page) -> None:
    page.write("half a thought")
    page.wait(lambda: page.chats() == ["half a thought"])
    page.click("#tune")
    page.one("#set-instructions").send_keys("Be brief.")
    page.one("#set-temperature").send_keys("0.5")
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.driver.refresh()
    page.wait(lambda: page.one("#prompt").get_attribute("value") == "half a thought")
    page.js(
        "document.querySelector('#effort').value = 'low';"
        "document.querySelector('#effort').dispatchEvent(new Event('change'))"
    )
    page.say(", whole")
    conversation, options = page.llm.seen[-1]
    assert (conversation.instructions, conversation.reasoning_effort) == ("Be brief.", "low")
    assert options["params"].temperature == 0.5
    assert conversation.messages[0].content == "half a thought, whole"


def test_there_are_no_switches_where_the_server_offers_no_tools(page: Page) -> None:
    page.click("#tune")
    page.wait(page.one("#settings").is_displayed)
    assert not page.one("#served").is_displayed()


def test_a_schema_and_tools_are_sent_and_results_given_by_hand(page: Page) -> None:
    page.click("#tune")
    page.one("#set-tools").send_keys("[{")
    page.one("#set-instructions").click()
    assert page.text("#set-error").startswith("Tools:")
    field = page.one("#set-tools")
    field.clear()
    field.send_keys(json.dumps([{"name": "get_weather", "parameters": {"type": "object"}}]))
    page.one("#set-schema").send_keys('{"type": "object"}')
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.write("weather?" + Keys.ENTER)
    page.one(".call textarea").send_keys("12 degrees")
    assert "get_weather" in last(page, ".call summary")
    page.click(".call .primary")
    page.wait(lambda: len(page.find(".turn.assistant")) == 2)
    page.finished()
    conversation, _ = page.llm.seen[-1]
    assert [m.role for m in conversation.messages][-1] == "tool"
    assert conversation.messages[-1].content == "12 degrees"
    assert [tool.name for tool in conversation.tools] == ["get_weather"]
    assert page.llm.seen[0][1]["schema"] == {"type": "object"}


def test_errors_are_told_in_words_with_a_retry(page: Page) -> None:
    page.llm.write = scripted(Script(text="never shown in full", fail_after=6))
    page.say("hm")
    assert last(page, ".failure p") == "the engine failed"
    page.llm.write = answer
    page.click(".failure button")
    page.wait(lambda: last(page) == "You said: hm")


def test_chats_are_renamed_found_deleted_and_brought_back(page: Page) -> None:
    page.say("apples and pears")
    page.click("#new")
    page.say("bread")
    page.wait(lambda: page.chats() == ["bread", "apples and pears"])
    page.js("document.querySelector('[aria-label=\"Actions for bread\"]').click()")
    page.click("#menu button:first-child")
    page.one("#list input").send_keys(CONTROL + "a", Keys.NULL, "Baking", Keys.ENTER)
    page.wait(lambda: page.chats() == ["Baking", "apples and pears"])
    page.one("#search").send_keys("you said: APPLES")
    page.wait(lambda: page.chats() == ["apples and pears"])
    page.one("#search").clear()
    page.one("#search").send_keys(" ", Keys.BACKSPACE)
    page.wait(lambda: len(page.chats()) == 2)
    page.js("document.querySelector('[aria-label=\"Actions for Baking\"]').click()")
    page.click("#menu button:last-child")
    page.wait(lambda: page.chats() == ["apples and pears"] and not page.find(".turn"))
    page.click(".toast button")
    page.wait(lambda: page.chats() == ["Baking", "apples and pears"] and last(page) == "You said: bread")


def test_chats_are_exported_and_imported(page: Page, tmp_path: Path) -> None:
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    page.say("keep me")
    page.wait(lambda: page.chats() == ["keep me"])
    for item, name in ((2, "keep me.md"), (3, "keep me.json")):
        page.js("document.querySelector('[aria-label=\"Actions for keep me\"]').click()")
        page.click(f"#menu button:nth-child({item})")
        page.wait((tmp_path / name).exists)
    assert (tmp_path / "keep me.md").read_text("utf-8") == (
        "# keep me\n\n## You\n\nkeep me\n\n## Assistant\n\nYou said: keep me\n"
    )
    for _ in range(2):  # again adds nothing
        page.js("document.querySelector('#import-file').value = ''")
        page.one("#import-file").send_keys(str(tmp_path / "keep me.json"))
        page.wait(lambda: "Imported 1 chat." in page.text("#toasts"))
        assert page.chats() == ["keep me"] and len(page.find(".turn")) == 2
    page.driver.get(page.url + "/static/icon.svg")
    page.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": page.url, "storageTypes": "all"})
    page.open()
    page.one("#import-file").send_keys(str(tmp_path / "keep me.json"))
    page.wait(lambda: page.chats() == ["keep me"])
    page.click("#list a")
    page.wait(lambda: last(page) == "You said: keep me")
    (tmp_path / "bad.json").write_text('{"chats": [{}]}')
    page.one("#import-file").send_keys(str(tmp_path / "bad.json"))
    page.wait(lambda: "is not a file of chats" in page.text("#toasts"))


def test_text_files_become_part_of_the_message(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.py").write_text("print('hi')\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    page.one("#file").send_keys(f"{tmp_path / 'notes.py'}\n{tmp_path / 'image.png'}")
    page.wait(lambda: "notes.py" in page.text(".file") and "not a text file" in page.text("#toasts"))
    page.driver.refresh()
    page.wait(lambda: "notes.py" in page.text(".file"))
    page.say("What does it do?")
    sent = page.llm.seen[-1][0].messages[0].content
    assert sent == "File notes.py:\n\n```py\nprint('hi')\n\n```\n\nWhat does it do?"
    assert page.text(".attached summary") == "notes.py"


def test_scrolling_up_is_respected(page: Page) -> None:
    page.llm.write = scripted(Script(text="A paragraph of words.\n\n" * 150, delay=0.003))
    page.write("long" + Keys.ENTER)
    page.wait(lambda: page.js("return document.querySelector('#scroll').scrollTop") > 300)
    page.js("document.querySelector('#scroll').scrollTop = 50")
    page.wait(lambda: page.one("#latest").is_displayed())
    height = page.js("return document.querySelector('#scroll').scrollHeight")
    page.wait(lambda: page.js("return document.querySelector('#scroll').scrollHeight") > height + 300)
    assert page.js("return document.querySelector('#scroll').scrollTop") == 50
    page.click("#latest")
    at_end = (
        "const s = document.querySelector('#scroll');"
        "return s.scrollHeight - s.scrollTop - s.clientHeight < 60"
    )
    page.wait(lambda: page.js(at_end))
    page.finished()
    assert page.js(at_end)


def test_the_composer_grows_and_shift_enter_begins_a_line(page: Page) -> None:
    low = page.one("#prompt").size["height"]
    page.write("a" + Keys.SHIFT + Keys.ENTER + Keys.ENTER + Keys.NULL + "b")
    assert page.one("#prompt").get_attribute("value") == "a\n\nb"
    assert page.one("#prompt").size["height"] > low + 30
    assert not page.find(".turn")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen_and_fingers_can_hit_it(page: Page, width: int, scheme: str) -> None:
    wide = "\n\n| " + "cell | " * 30 + "\n|" + "---|" * 30 + "\n\n```\n" + "x" * 500 + "\n```\n\n" + "y" * 400
    page.llm.write = scripted(Script(text=RICH + wide + r"\[" + "a + " * 80 + r"b\]"))
    page.sizes(width, 844)
    page.scheme(scheme)
    page.say("wide " + "z" * 300)
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.js("const s = document.querySelector('#scroll'); return s.scrollWidth - s.clientWidth") == 0
    ground = page.js("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(27, 27, 29)")
    if width == 390:
        page.click("#open-side")
        page.wait(lambda: page.one("#close-side").is_displayed())
        small = (
            "return [...document.querySelectorAll('button, a, select, summary, #search')].filter(e => {"
            " const b = e.getBoundingClientRect();"
            " return e.checkVisibility({visibilityProperty: true}) && b.width &&"
            " !e.closest('.body p, .body li, .skip') && b.height < 43.5 }).map(e => e.outerHTML.slice(0, 80))"
        )
        assert page.js(small) == []
        page.press(Keys.ESCAPE)
        page.wait(lambda: page.js("return !document.body.classList.contains('drawer-open')"))


def test_the_header_shows_a_dead_server(page: Page) -> None:
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/health", "*/v1/*"]})
    page.js("dispatchEvent(new Event('online'))")
    page.wait(lambda: page.text("#model") == "no connection")
    page.write("hello?" + Keys.ENTER)
    page.wait(lambda: last(page, ".failure p") == "The server does not answer. Is it still running?")
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.wait(lambda: page.text("#model") == "scripted")
    page.click(".failure button")
    page.wait(lambda: last(page) == "You said: hello?")


def test_the_sidebar_of_a_wide_screen_folds_and_stays_so(page: Page) -> None:
    page.click("#close-side")
    page.wait(lambda: page.one("#open-side").is_displayed())
    page.driver.refresh()
    page.wait(lambda: page.one("#open-side").is_displayed())
    page.click("#open-side")
    page.wait(lambda: page.one("#new").is_displayed())
