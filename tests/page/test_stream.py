"""A long answer as it comes: what is finished is sent and drawn once, and the end is shown at once."""

from __future__ import annotations

from typing import Any

from tests.page.browser import Keys, Page, scripted
from tests.page.streaming import long_answer
from tests.support.scripted_llm import Script

pytest_plugins = ["tests.support.server_fixtures"]

ANSWER = long_answer(20)
# How long a task of the page takes is for benchmarks/page.py to tell; here its work is counted. The stream is
# handed on a little at a time, and held up until the page has asked for most of what it has, so that neither
# the server's speed nor the browser's decides how much comes between two renderings.
WATCH = """
window.renderings = [];
window.kept = new Set();
let settled = 0, flying = 0, came = 0, asked = 0, go = () => {};
const body = () => document.querySelector('.turn.assistant .body');
const keep = () => [...(body()?.children ?? [])].slice(0, settled).forEach(node => kept.add(node));
const fetching = window.fetch;
window.fetch = async (address, options) => {
  if (!String(address).endsWith('/page/render')) return fetching(address, options);
  const [{ text, growing = false }] = JSON.parse(options.body).texts;
  keep();
  const note = { text, growing, flying: (flying += growing), shown: body()?.textContent ?? '' };
  renderings.push(note);
  asked = came;
  go();
  const response = await fetching(address, options);
  const told = await response.json();
  // Some answers come late, when the text has long grown.
  if (growing && renderings.length < 5) await new Promise(resolve => setTimeout(resolve, 300));
  const [blocks] = told.texts;
  note.lines = Math.max(0, ...blocks.map(block => block.lines ?? 0));
  flying -= growing;
  // One that is on its way when the stream ends is not waited for: the end is asked for beside it.
  note.used = growing && renderings.findLast(one => one.growing) === note;
  if (note.used) settled += blocks.filter(block => block.lines !== null).length;
  // Drawn before anything else happens: no promise that the page awaits is still open.
  return { ok: response.ok, status: response.status, json: async () => told };
};
const read = ReadableStreamDefaultReader.prototype.read;
let held = new Uint8Array();
ReadableStreamDefaultReader.prototype.read = async function() {
  if (!held.length) {
    const { value, done } = await read.call(this);
    if (done) return { value, done };
    held = value;
  }
  if (came - asked > 20000) await new Promise(resolve => { go = resolve });
  const value = held.slice(0, 4000);
  held = held.slice(4000);
  came += value.length;
  return { value, done: false };
};
"""


def test_what_is_finished_is_sent_and_drawn_once_and_the_end_is_shown_at_once(page: Page) -> None:
    page.llm.write = scripted(Script(text=ANSWER))
    page.js(WATCH)
    page.write("go" + Keys.ENTER)
    page.wait(lambda: "THE END" in page.text(".turn.assistant"), seconds=60)
    page.wait(
        lambda: page.js("return renderings.some(one => one.text === arguments[0] && one.lines)", ANSWER)
    )
    assert page.js("return document.querySelectorAll('.body math mfrac').length") == 40
    assert page.js("return document.querySelectorAll('.body figure.code').length") == 20
    renderings: list[dict[str, Any]] = page.js("return renderings")
    growing = [one for one in renderings if one["growing"]]
    assert len(growing) > 10
    assert all(one["flying"] == 1 for one in growing[:-1]), "the next is asked for when the last has come"
    begin = 0
    for one in growing:
        assert ANSWER.startswith(one["text"], begin), "from the first block that is not finished"
        if one.get("used"):
            begin += sum(len(line) for line in one["text"].splitlines(keepends=True)[: one["lines"]])
    assert page.js("return kept.size") > 60
    assert page.js("return [...kept].filter(node => !node.isConnected).length") == 0
    (whole,) = [one for one in renderings if one["text"] == ANSWER]
    assert "THE END" in whole["shown"], "before the whole is rendered again"
