// The page: what is shown follows from the address, #/chat.

import { setKey } from "./api.js";
import * as answers from "./answers.js";
import * as chat from "./chat.js";
import * as composer from "./composer.js";
import { $, el, newId } from "./dom.js";
import { startKeys } from "./keys.js";
import { watchScrolling } from "./scrolling.js";
import { server, watchServer } from "./server.js";
import { drawSettings, startSettings } from "./settings.js";
import { drawSoon, startSidebar, titleOf } from "./sidebar.js";
import { eraseOld } from "./store.js";

const SUGGESTIONS = [
  ["Explain", "why the sky is blue, in three sentences."],
  ["Write", "a Python function that finds the prime numbers below n, and explain its cost."],
  ["Compare", "TCP and UDP in a table."],
  ["Derive", "the formula for the roots of a quadratic equation."],
];

/** A chat without messages; the shown one, if it is that. */
function startNew() {
  const { id } = chat.current();
  const used = chat.shownPath().length || composer.hasDraft(id) || !location.hash.startsWith("#/");
  if (used) location.hash = `#/${newId()}`;
  else composer.focus();
}

async function route() {
  const { hash } = location;
  if (hash.startsWith("#key=")) {
    setKey(decodeURIComponent(hash.slice(5)), true);
    history.replaceState(null, "", "/");
  }
  if (!location.hash.startsWith("#/")) history.replaceState(null, "", `#/${newId()}`);
  await chat.open(location.hash.slice(2));
  drawSoon();
}

/** What of the page depends on the chat that is shown. */
function drawAround() {
  const one = chat.current();
  const title = titleOf(one);
  $("heading", HTMLElement).textContent = title;
  document.title = chat.shownPath().length ? `${title} – gpt-oss` : "gpt-oss";
  drawSettings();
  const { context, model } = server();
  const count = (/** @type {number} */ value) => value.toLocaleString("en");
  $("context", HTMLElement).textContent =
    one.tokens && context ? `${count(one.tokens)} of ${count(context)} tokens of context used` : "";
  $("about", HTMLElement).textContent = model
    ? `${model} runs on this computer${context ? ` and remembers ${count(context)} tokens` : ""}. Nothing you write leaves it.`
    : "";
  drawSoon();
}

function startSuggestions() {
  $("suggestions", HTMLElement).append(
    ...SUGGESTIONS.map(([verb, rest]) =>
      el("button", { type: "button", onclick: () => composer.fill(`${verb} ${rest}`) }, el("strong", {}, verb), ` ${rest}`),
    ),
  );
}

/** Links within a text (its footnotes) scroll; the address stays the chat's. */
function followNotes() {
  $("log", HTMLElement).addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a[href^='#']") : null;
    if (!link) return;
    event.preventDefault();
    document.getElementById(link.getAttribute("href")?.slice(1) ?? "")?.scrollIntoView({ block: "center" });
  });
  document.querySelector(".skip")?.addEventListener("click", (event) => {
    event.preventDefault();
    $("prompt", HTMLTextAreaElement).focus();
  });
}

startSettings();
startSuggestions();
chat.startChat(drawAround);
startSidebar(() => chat.current().id, startNew);
startKeys(startNew);
watchScrolling();
watchServer(drawAround);
followNotes();
addEventListener("hashchange", route);
await route();
await answers.settleOrphans();
await chat.refresh();
await eraseOld();
