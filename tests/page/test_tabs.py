"""Two tabs and a window at once, and a server that comes and goes: nothing is lost, nothing shown twice."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import Any

from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.tokenizer import Tokenizer
from tests.page.browser import Page, TimeoutException, make_driver
from tests.support.scripted_llm import Script, ScriptedLLM
from tests.support.server_help import live

pytest_plugins = ["tests.support.server_fixtures"]

ACTIONS = 200
READ = """
const done = arguments[0];
const request = indexedDB.open('gptoss');
request.onsuccess = () => {
  const db = request.result;
  const all = db.transaction(['conversations', 'messages']);
  const chats = all.objectStore('conversations').getAll(), messages = all.objectStore('messages').getAll();
  all.oncomplete = () => {
    const drafts = Object.fromEntries(Object.keys(localStorage).filter(key => key.startsWith('gptoss.draft.'))
      .map(key => [key.slice(13), JSON.parse(localStorage[key]).text]));
    db.close();
    done([chats.result, messages.result, drafts]);
  };
};
"""
TYPE = (
    "const field = document.querySelector(arguments[0]);"
    "field.value = arguments[1]; field.dispatchEvent(new Event('input'))"
)
LISTED = "return [...document.querySelectorAll('#list li')].map(row => row.dataset.id)"


class _People:
    """What was done in all the tabs, and what must therefore be there."""

    def __init__(self, page: Page, seed: int) -> None:
        self.page = page
        self.random = random.Random(seed)
        self.sent: dict[str, str] = {}  # text -> chat
        self.drafts: dict[str, str] = {}  # chat -> text
        self.deleted: list[str] = []
        self.count = 0

    @property
    def chat(self) -> str:
        return str(self.page.js("return location.hash.slice(2)"))

    def text(self) -> str:
        self.count += 1
        return f"text {self.count} of {self.count * 7919}"

    def here(self) -> None:
        """Writing in a chat that was deleted brings it back."""
        if self.chat in self.deleted:
            self.deleted.remove(self.chat)

    def new(self) -> None:
        self.page.js("document.querySelector('#new').click()")

    def draft(self) -> None:
        text = self.text()
        self.page.js(TYPE, "#prompt", text)
        self.drafts[self.chat] = text
        self.here()

    def send(self) -> None:
        """It stays a draft while an answer is being written."""
        self.draft()
        chat = self.chat
        click = (
            "const b = document.querySelector('#send'); const can = !b.disabled && !b.hidden;"
            "b.click(); return can"
        )
        if self.page.js(click):
            gone = "return localStorage['gptoss.draft.' + arguments[0]] === undefined"
            self.page.wait(lambda: self.page.js(gone, chat))
            self.sent[self.drafts.pop(chat)] = chat

    def edit(self) -> None:
        if self.page.js("return document.querySelector('#send').hidden") or not self.page.find(".turn.user"):
            return
        if not self.page.js(
            "const b = document.querySelector('.turn.user [aria-label=Edit]'); b?.click(); return Boolean(b)"
        ):
            return
        text = self.text()
        chat = self.chat
        self.page.js(TYPE, ".editor textarea", text)
        self.page.js("document.querySelector('.editor .primary').click()")
        # Refused while another tab has an answer written below: then the edit stays open.
        state = (
            "return [document.querySelector('.editor textarea')?.value,"
            " document.querySelector('#send').hidden]"
        )
        self.page.wait(lambda: self.page.js(state)[0] != text or self.page.js(state)[1])
        if self.page.js(state)[0] == text and text not in self.page.text("#log"):
            self.page.js("document.querySelector('.editor button').click()")
        else:
            self.sent[text] = chat
            self.here()

    def again(self) -> None:
        self.page.js(
            "[...document.querySelectorAll('[aria-label=\"Answer again\"], .failure button')].at(-1)?.click()"
        )

    def switch(self) -> None:
        links = self.page.js("return [...document.querySelectorAll('#list a')].map(a => a.hash)")
        if links:
            self.page.js("location.hash = arguments[0]", self.random.choice(links))

    def delete(self) -> None:
        chat = self.page.js(
            "const rows = [...document.querySelectorAll('#list li')]; if (!rows.length) return null;"
            "const row = rows[Math.floor(arguments[0] * rows.length)]; row.querySelector('button').click();"
            "document.querySelector('#menu button:last-child').click(); return row.dataset.id",
            self.random.random(),
        )
        if chat:
            self.page.wait(lambda: self.page.js("return document.querySelector('.toast button')"))
            self.deleted.append(chat)

    def undo(self) -> None:
        toast = (
            "const b = [...document.querySelectorAll('.toast button')].at(-1); b?.click(); return Boolean(b)"
        )
        if not self.page.js(toast):
            return
        # The chat is shown again; unless it was brought back before, by being written in.
        with contextlib.suppress(TimeoutException):
            self.page.wait(lambda: self.chat in self.deleted, seconds=1)
            self.deleted.remove(self.chat)

    def reload(self) -> None:
        self.page.driver.refresh()


def test_nothing_is_lost_and_nothing_shown_twice(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    llm.write = lambda conversation, _: Script(text="A few words. " * 40, delay=0.004)  # half a second
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = ServerSettings(port=port, shutdown_grace=0.1)
    driver = make_driver()
    server = contextlib.ExitStack()

    def start() -> str:
        return server.enter_context(live(create_app(llm, settings)))  # type: ignore[arg-type]

    try:
        page = Page(driver, llm, start())
        page.open()
        tabs = [driver.current_window_handle]
        for kind in ("tab", "window"):
            driver.switch_to.new_window(kind)
            page.open()
            tabs.append(driver.current_window_handle)
        people = _People(page, seed=14)
        kinds = [
            "new",
            "draft",
            "send",
            "send",
            "send",
            "edit",
            "again",
            "switch",
            "switch",
            "delete",
            "undo",
            "reload",
        ]
        done: dict[str, int] = {}
        for number in range(ACTIONS):
            driver.switch_to.window(people.random.choice(tabs))
            if number % 40 == 39:
                server.close()
                people.draft()
                start()
                continue
            kind = people.random.choice(kinds)
            done[kind] = done.get(kind, 0) + 1
            getattr(people, kind)()
        _check(page, people, tabs)
        print(
            done,
            f"{len(people.sent)} messages, {len(people.drafts)} drafts, {len(people.deleted)} deleted chats",
        )
    finally:
        driver.quit()
        server.close()


def _check(page: Page, people: _People, tabs: list[str]) -> None:
    chats: list[Any] = []
    for tab in tabs:
        page.driver.switch_to.window(tab)
        page.driver.refresh()
    page.wait(lambda: "running" not in {m["state"] for m in page.driver.execute_async_script(READ)[1]})
    chats, messages, drafts = page.driver.execute_async_script(READ)
    by_id = {message["id"]: message for message in messages}
    texts = [message["content"] for message in messages if message["role"] == "user"]
    assert sorted(texts) == sorted(people.sent)
    assert {m["content"]: m["conversation"] for m in messages if m["role"] == "user"} == people.sent
    assert all(
        m["parent"] is None or by_id[m["parent"]]["conversation"] == m["conversation"] for m in messages
    )
    assert drafts == people.drafts
    wanted = (set(people.sent.values()) | set(people.drafts)) - set(people.deleted)
    assert {chat["id"] for chat in chats if not chat.get("deleted")} >= wanted
    for tab in tabs:
        page.driver.switch_to.window(tab)
        page.wait(lambda: len(page.js(LISTED)) >= len(wanted))
        shown = page.js(LISTED)
        assert len(shown) == len(set(shown)) and wanted <= set(shown)
        assert not set(shown) & set(people.deleted)
