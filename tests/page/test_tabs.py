"""Two tabs and two windows at once, and a server that is killed: nothing is lost, nothing shown twice."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any

from tests.page.browser import Page, TimeoutException, make_driver
from tests.page.scripted_server import KillableServer

pytest_plugins = ["tests.support.server_fixtures"]

ACTIONS = int(os.environ.get("PAGE_ACTIONS", "50"))  # `make page` takes 200
KINDS = [
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
OFFLINE = [
    "new",
    "draft",
    "send",
    "send",
    "edit",
    "again",
    "switch",
    "delete",
    "undo",
]  # what needs no server
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
        self.seen: dict[str, str] = {}  # answer -> what of it was on the screen when the server was killed
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

    def outage(self, server: KillableServer) -> None:
        """The server is killed in the middle of an answer, and comes back after a while."""
        self.new()
        self.page.wait(lambda: not self.page.find(".turn"))
        self.send()
        answer = ".turn.assistant:last-child"
        self.page.wait(lambda: self.page.text(f"{answer} .body").count("words") > 3)
        shown = self.page.text(f"{answer} .body")
        server.kill()
        self.page.wait(lambda: "broke off" in self.page.text(f"{answer} .failure p"))
        self.seen[self.page.js("return document.querySelector(arguments[0]).dataset.id", answer)] = shown
        for _ in range(4):
            getattr(self, self.random.choice(OFFLINE))()
        server.start()
        self.page.wait(lambda: self.page.text("#model") == "scripted")


def test_nothing_is_lost_and_nothing_shown_twice(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = KillableServer(port, tmp_path / "tokenizer")
    driver = make_driver()
    try:
        page = Page(driver, server.start())
        page.open()
        tabs = [driver.current_window_handle]
        for kind in ("tab", "window", "window"):
            driver.switch_to.new_window(kind)
            page.open()
            tabs.append(driver.current_window_handle)
        people = _People(page, seed=14)
        done = Counter[str]()
        for number in range(ACTIONS):
            driver.switch_to.window(people.random.choice(tabs))
            kind = "outage" if number % 25 == 24 else people.random.choice(KINDS)
            done[kind] += 1
            if kind == "outage":
                people.outage(server)
            else:
                getattr(people, kind)()
        _check(page, people, tabs)
        print(
            dict(done),
            f"{len(people.sent)} messages, {len(people.drafts)} drafts, {len(people.deleted)} deleted chats",
        )
        assert len(people.seen) == ACTIONS // 25
    finally:
        driver.quit()
        server.kill()


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
    for answer, shown in people.seen.items():
        assert by_id[answer]["content"].startswith(shown.strip()) and by_id[answer]["state"] == "failed"
    wanted = (set(people.sent.values()) | set(people.drafts)) - set(people.deleted)
    there = {chat["id"] for chat in chats if not chat.get("deleted")}
    assert not wanted - there, [(chat, people.drafts.get(chat)) for chat in wanted - there]
    for tab in tabs:
        page.driver.switch_to.window(tab)
        page.wait(lambda: len(page.js(LISTED)) >= len(wanted))
        shown = page.js(LISTED)
        assert len(shown) == len(set(shown)) and wanted <= set(shown)
        assert not set(shown) & set(people.deleted)


def test_who_writes_in_a_chat_that_another_tab_deleted_keeps_it(page: Page) -> None:
    driver = page.driver
    page.say("mine")
    page.wait(lambda: page.chats() == ["mine"])
    first = driver.current_window_handle
    address = page.js("return location.hash")
    driver.switch_to.new_window("tab")
    page.open("/" + address)
    page.wait(lambda: page.chats() == ["mine"])
    page.js("document.querySelector('#list li button').click()")
    page.click("#menu button:last-child")
    page.wait(lambda: not page.chats())
    driver.close()
    driver.switch_to.window(first)
    page.wait(lambda: not page.chats())
    page.write("more")
    page.wait(lambda: page.chats() == ["mine"])
