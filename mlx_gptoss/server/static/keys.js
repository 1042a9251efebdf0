// Keyboard shortcuts, and the sheet that lists them.

import * as chat from "./chat.js";
import { $, el } from "./dom.js";
import { offered } from "./feedback.js";
import { openSettings } from "./settings.js";
import { toggleSidebar } from "./sidebar.js";

const apple = /Mac|iPhone|iPad/.test(navigator.platform);
const COMMAND = apple ? "⌘" : "Ctrl";

/** @type {[string, string][]} */
const SHEET = [
  ["Enter", "Send the message"],
  ["Shift Enter", "Begin a new line"],
  ["Esc", "Stop the answer"],
  [`${COMMAND} Shift O`, "New chat"],
  [`${COMMAND} K`, "Search the chats"],
  [`${COMMAND} Shift Z`, "Bring back a deleted chat"],
  [`${COMMAND} Shift S`, "Show or hide the sidebar"],
  [`${COMMAND} ,`, "Settings of this chat"],
  ["Shift Esc", "Go to the message field"],
  ["Alt ↑", "Edit the last message"],
  [`${COMMAND} /`, "This sheet"],
];

function openSheet() {
  $("shortcuts", HTMLDialogElement).showModal();
}

function search() {
  toggleSidebar(true);
  $("search", HTMLInputElement).focus();
}

/**
 * @param {KeyboardEvent} event
 * @param {() => void} startNew
 * @returns {(() => unknown) | undefined}
 */
function actionOf(event, startNew) {
  const key = event.key.toLowerCase();
  const command = apple ? event.metaKey : event.ctrlKey;
  if (key === "escape" && event.shiftKey) return () => $("prompt", HTMLTextAreaElement).focus();
  if (key === "escape") return escape;
  if (event.altKey && key === "arrowup") return chat.editLast;
  if (!command) return undefined;
  if (event.shiftKey) return { o: startNew, s: () => toggleSidebar(), z: offered() }[key];
  return { k: search, ",": openSettings, "/": openSheet }[key];
}

function escape() {
  if (document.querySelector("#menu:popover-open") || document.activeElement?.matches("#search:not(:placeholder-shown)")) return;
  if (document.body.classList.contains("drawer-open")) {
    toggleSidebar(false);
    $("open-side", HTMLButtonElement).focus();
  } else chat.stopAnswer();
}

/**
 * Begin; once.
 * @param {() => void} startNew
 */
export function startKeys(startNew) {
  $("shortcut-list", HTMLElement).append(
    ...SHEET.flatMap(([keys, what]) => [
      el("dt", {}, ...keys.split(" ").map((key) => el("kbd", {}, key))),
      el("dd", {}, what),
    ]),
  );
  const sheet = $("shortcuts", HTMLDialogElement);
  sheet.addEventListener("click", (event) => event.target === sheet && sheet.close());
  $("help", HTMLButtonElement).addEventListener("click", openSheet);
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const action = actionOf(event, startNew);
    if (!action) return;
    if (event.key !== "Escape") event.preventDefault();
    action();
  });
}
