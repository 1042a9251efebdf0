"""What the page shows of a chat: the empty state, an answer as it comes, its limits, and its settings."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_gptoss.sampling import PromptProgress
from tests.page.browser import CONTROL, Keys, Page, scripted
from tests.page.test_chat import RICH, last
from tests.support.scripted_llm import Script

pytest_plugins = ["tests.support.server_fixtures"]

STYLE = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"


def test_an_empty_chat_says_what_the_model_is_and_what_to_ask(page: Page) -> None:
    assert "scripted runs on this computer and remembers 4,096 tokens" in page.text("#about")
    suggestions = page.find("#suggestions button")
    assert len(suggestions) == 4
    suggestion = suggestions[1].text.replace("\n", " ")
    page.wait(lambda: (suggestions[1].click(), True)[1])
    assert page.one("#prompt").get_attribute("value") == suggestion
    page.click("#send:enabled")
    page.wait(lambda: last(page) == f"You said: {suggestion}")
    assert not page.one("#empty").is_displayed()


def test_actions_appear_under_the_pointer_and_are_always_there_for_fingers(page: Page) -> None:
    page.say("one")
    page.say("two")
    shown = "return [...document.querySelectorAll('.acts')].map(bar => getComputedStyle(bar).opacity)"
    page.js("document.activeElement.blur()")
    page.wait(lambda: page.js(shown) == ["0", "0", "0", "1"], seconds=5)
    page.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mouseMoved"}
        | page.js(
            "const b = document.querySelector('.turn .body').getBoundingClientRect();"
            "return {x: b.x + 5, y: b.y + 5}"
        ),
    )
    page.wait(lambda: page.js(shown) == ["1", "0", "0", "1"], seconds=5)
    page.sizes(390, 844)
    page.wait(lambda: page.js(shown) == ["1"] * 4, seconds=5)
    for selector in (".turn.assistant", ".turn.assistant .body"):
        assert page.js(STYLE, selector, "borderTopWidth") == "0px"
        assert page.js(STYLE, selector, "backgroundColor") == "rgba(0, 0, 0, 0)"


def test_reasoning_is_open_while_it_streams_and_folds_with_its_time(page: Page) -> None:
    page.llm.write = scripted(Script(reasoning="hm, " * 300, text="So. " * 200, delay=0.004))
    page.write("think" + Keys.ENTER)
    page.wait(lambda: last(page, ".reasoning summary") == "Thinking…")
    page.wait(lambda: last(page, ".reasoning[open] .thoughts").count("hm") > 20)
    assert page.js(STYLE, ".reasoning", "color") != page.js(STYLE, "body", "color"), "muted"
    page.wait(lambda: last(page, ".reasoning summary").startswith("Thought for"))
    page.wait(lambda: not page.find(".reasoning[open]"))
    page.click(".reasoning summary")
    assert last(page, ".thoughts").count("hm") == 300
    page.wait(lambda: last(page).count("So.") > 20)
    assert page.find(".reasoning[open]"), "what was opened stays open as more comes"
    page.click("#stop")
    page.finished()
    assert page.find(".reasoning[open]")


def test_a_long_prompt_shows_how_much_of_it_is_read(page: Page) -> None:
    def reads(total: int) -> list[PromptProgress]:
        return [PromptProgress(0, 0, total), PromptProgress(total // 2, 0, total)]

    page.llm.write = scripted(Script(text="short", reads=reads(600), pause=0.5))
    page.write("short" + Keys.ENTER)
    seen: list[str] = []

    def answered() -> bool:
        seen.append(last(page, ".wait"))
        return last(page) == "short"

    page.wait(answered)
    assert set(seen) == {""}, "what takes no time is not told"
    page.finished()
    page.llm.write = scripted(Script(text="long", reads=reads(3000), pause=1.5))
    page.write("long" + Keys.ENTER)
    page.wait(lambda: last(page, ".wait") == "Reading the conversation: 0 of 3,000 tokens")
    page.wait(lambda: last(page, ".wait") == "Reading the conversation: 1,500 of 3,000 tokens")
    page.wait(lambda: last(page) == "long")
    page.finished()
    assert not page.one(".turn:last-child .wait").is_displayed()


def test_an_answer_has_a_limit_and_can_go_on(page: Page) -> None:
    page.llm.write = scripted(Script(text="Once upon a time", finish_reason="length"))
    page.say("Tell me a story")
    params = page.llm.seen[-1][1]["params"]
    assert str(params.max_tokens) == page.one("#set-max_tokens").get_attribute("placeholder") == "16384"
    assert last(page, ".failure p") == "Cut off after 10 tokens, the longest answer that the settings allow."
    page.llm.write = scripted(Script(text="there was a king."))
    page.click(".failure button")
    page.wait(lambda: last(page) == "there was a king.")
    page.finished()
    asked = [message.content for message in page.llm.seen[-1][0].messages]
    assert asked[0] == "Tell me a story" and asked[-1] == "Continue." and "Once upon a time" in asked
    assert not page.find(".failure button"), "only the last answer goes on"
    page.llm.write = scripted(Script(text="", finish_reason="length"))
    page.say("and then?")
    assert "before the reasoning came to an end" in last(page, ".failure p")
    page.llm.write = scripted(Script(text="x" * 4 * 4096, finish_reason="length"))
    page.say("fill it")
    assert "The context of 4,096 tokens is full." in last(page, ".failure p")
    assert not page.find(".failure button")


def test_every_setting_reaches_the_server_and_stays_with_its_chat(page: Page) -> None:
    page.click("#tune")
    for name, value in (("temperature", "0.3"), ("top_p", "0.85"), ("max_tokens", "77")):
        page.one(f"#set-{name}").send_keys(value)
    page.one("#set-instructions").send_keys("Rhyme.")
    page.js(
        "const e = document.querySelector('#set-effort'); e.value = 'high';"
        "e.dispatchEvent(new Event('change'))"
    )
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.say("hi")
    conversation, options = page.llm.seen[-1]
    params = options["params"]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.85, 77)
    assert (conversation.instructions, conversation.reasoning_effort) == ("Rhyme.", "high")
    page.click("#new")
    page.wait(lambda: not page.find(".turn"))
    page.say("another")
    conversation, options = page.llm.seen[-1]
    assert conversation.instructions is None
    assert (options["params"].temperature, options["params"].max_tokens) != (0.3, 77)
    assert conversation.reasoning_effort == "high", "a new chat begins with the effort chosen last"


def test_the_colours_can_be_chosen_and_stay_so(page: Page) -> None:
    page.click("#options")
    for theme, ground in (("dark", "rgb(27, 27, 29)"), ("light", "rgb(255, 255, 255)")):
        page.js(
            "const e = document.querySelector('#theme'); e.value = arguments[0];"
            "e.dispatchEvent(new Event('change'))",
            theme,
        )
        assert page.js(STYLE, "body", "backgroundColor") == ground
    page.scheme("dark")
    page.driver.refresh()
    page.wait(lambda: page.text("#model") == "scripted")
    assert page.js(STYLE, "body", "backgroundColor") == "rgb(255, 255, 255)", "whatever the system says"


def test_a_long_block_of_code_keeps_its_header_and_a_wide_table_scrolls(page: Page) -> None:
    table = "| " + "a cell | " * 30 + "\n|" + "---|" * 30
    code = "```python\n" + "\n".join(f"line_{n} = {n}" for n in range(80)) + "\n```"
    page.llm.write = scripted(Script(text=f"{table}\n\n{code}\n\nThe end."))
    page.say("code")
    page.js("document.querySelector('#scroll').scrollTop = document.querySelector('figure').offsetTop + 400")
    top = "const at = e => document.querySelector(e).getBoundingClientRect().top;"
    page.wait(lambda: page.js(top + "return at('figcaption') - at('#scroll')") < 2)
    assert page.js(top + "return at('figure') < at('figcaption') - 100")
    assert page.one("figcaption button").is_displayed()
    assert page.js(
        "const t = document.querySelector('.body .table'); t.scrollLeft = 100;"
        "return [t.scrollLeft, t.scrollWidth > t.clientWidth, document.querySelector('#scroll').scrollLeft]"
    ) == [100, True, 0]


def test_a_call_shows_its_arguments_and_its_result(page: Page) -> None:
    page.llm.write = scripted(Script(calls=[("get_weather", '{"city": "Paris"}')]))
    page.click("#tune")
    page.one("#set-tools").send_keys(json.dumps([{"name": "get_weather", "parameters": {"type": "object"}}]))
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    page.write("weather?" + Keys.ENTER)
    page.wait(lambda: last(page, ".call pre") == '{\n  "city": "Paris"\n}')
    page.llm.write = scripted(Script(text="It is mild."))
    page.one(".call textarea").send_keys('{"degrees": 12}')
    page.click(".call .primary")
    page.wait(lambda: last(page) == "It is mild.")
    page.finished()
    assert not page.find(".call[open]"), "folded when it has its result"
    page.click(".call summary")
    assert [pre.text for pre in page.find(".call pre")] == [
        '{\n  "city": "Paris"\n}',
        '{\n  "degrees": 12\n}',
    ]


def test_text_files_are_dropped_anywhere(page: Page) -> None:
    page.js(
        "const data = new DataTransfer();"
        "data.items.add(new File(['a,b\\n1,2\\n'], 'table.csv', {type: 'text/csv'}));"
        "const send = type => document.querySelector('#log, #scroll').dispatchEvent("
        " new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data}));"
        "send('dragover'); window.shown = !document.querySelector('#drop').hidden; send('drop')"
    )
    assert page.js("return window.shown")
    page.wait(lambda: page.text(".file") == "table.csv")
    assert not page.one("#drop").is_displayed()
    page.click(".file button")
    page.wait(lambda: not page.find(".file"))


def test_a_screen_reader_hears_of_the_end_of_an_answer_and_of_what_was_copied(page: Page) -> None:
    page.say("hello")
    page.wait(
        lambda: page.js("return document.querySelector('#spoken').textContent") == "The answer is complete."
    )
    page.js("document.execCommand = () => true")
    page.click(".turn:last-child [aria-label=Copy]")
    page.wait(lambda: page.js("return document.querySelector('#spoken').textContent") == "Copied")
    page.llm.write = scripted(Script(text="no", fail_after=1))
    page.say("fail")
    page.wait(lambda: page.js("return document.querySelector('#spoken').textContent") == "the engine failed")


def test_escape_closes_what_is_open_before_it_stops_an_answer(page: Page) -> None:
    page.llm.write = scripted(Script(text="word " * 3000, delay=0.01))
    page.write("go on" + Keys.ENTER)
    page.wait(lambda: "word" in last(page))
    page.js("document.querySelector('#list li button').click()")
    page.wait(lambda: page.find("#menu:popover-open"))
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("#menu:popover-open"))
    page.press(CONTROL, "k")
    page.wait(lambda: page.js("return document.activeElement.id") == "search")
    page.press("go", Keys.ESCAPE)
    page.click("#tune")
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.find("dialog[open]"))
    assert not page.llm.running[-1].ended.is_set(), "the answer goes on"
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.llm.running[-1].ended.is_set())
    page.finished()


def test_a_download_has_everything_that_is_worth_reading(page: Page, tmp_path: Path) -> None:
    """A conversation as Markdown: formulas and code as they were written."""
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    page.llm.write = scripted(Script(text=RICH))
    page.say("rich")
    page.js("document.querySelector('#list li button').click()")
    page.click("#menu button:nth-child(2)")
    page.wait((tmp_path / "rich.md").exists)
    assert RICH.strip() in (tmp_path / "rich.md").read_text("utf-8")
