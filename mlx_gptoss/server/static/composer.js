// The message being written: it grows with its text, takes text files, and its draft outlives a reload.

import { $, el, icon, iconButton } from "./dom.js";
import { toast } from "./feedback.js";

/** @import { TextFile } from "./types.js" */
/** @typedef {{ text: string, files: TextFile[] }} Draft */

const MAX_FILE = 500_000; // characters
const DRAFT = "gptoss.draft.";
const field = $("prompt", HTMLTextAreaElement);
const sendButton = $("send", HTMLButtonElement);
const touch = matchMedia("(pointer: coarse)");
/** @type {TextFile[]} */
let files = [];
let chat = "";
let busy = false;
/** @type {(draft: Draft) => Promise<void>} */
let send = async () => {};
/** @type {(chat: string, empty: boolean) => void} */
let drafted = () => {};

/**
 * The draft of a chat, as it was left.
 * @param {string} id
 * @returns {Draft}
 */
export function draftOf(id) {
  try {
    const { text = "", files: kept = [] } = JSON.parse(localStorage.getItem(DRAFT + id) ?? "{}");
    return { text, files: kept };
  } catch {
    return { text: "", files: [] };
  }
}

/**
 * Whether anything is written there that was not sent.
 * @param {string} id
 */
export function hasDraft(id) {
  return localStorage.getItem(DRAFT + id) !== null;
}

/**
 * Forget a chat's draft.
 * @param {string} id
 */
export function forgetDraft(id) {
  localStorage.removeItem(DRAFT + id);
}

/**
 * Show the draft of this chat, and keep what is written as its draft.
 * @param {string} id
 */
export function load(id) {
  const early = chat ? "" : field.value; // typed before the page was ready
  chat = id;
  const draft = draftOf(id);
  files = draft.files;
  field.value = draft.text + early;
  if (early) keep();
  draw();
}

/**
 * An answer is being written: stop takes the place of send.
 * @param {boolean} now
 */
export function setBusy(now) {
  busy = now;
  const stop = $("stop", HTMLButtonElement);
  const held = document.activeElement === sendButton || document.activeElement === stop;
  sendButton.hidden = now;
  stop.hidden = !now;
  if (held) field.focus();
  draw();
}

export function focus() {
  if (!touch.matches) field.focus();
}

/**
 * Put a text into the field.
 * @param {string} text
 */
export function fill(text) {
  field.value = text;
  changed();
  field.focus();
}

function keep() {
  const empty = !field.value && !files.length;
  try {
    if (empty) forgetDraft(chat);
    else localStorage.setItem(DRAFT + chat, JSON.stringify({ text: field.value, files }));
  } catch {
    toast("The browser's storage is full: this draft is lost when the page is reloaded.");
  }
  drafted(chat, empty);
}

function changed() {
  keep();
  draw();
}

function draw() {
  sendButton.disabled = busy || !(field.value.trim() || files.length);
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  const remove = (/** @type {TextFile} */ file) => {
    files = files.filter((one) => one !== file);
    changed();
    field.focus();
  };
  $("files", HTMLElement).replaceChildren(
    ...files.map((file) =>
      el("span", { class: "file" }, icon("file"), file.name, iconButton("close", `Remove ${file.name}`, () => remove(file))),
    ),
  );
}

async function submit() {
  if (sendButton.disabled) return;
  const from = chat;
  const draft = { text: field.value.trim(), files };
  field.value = "";
  files = [];
  draw();
  await send(draft); // which forgets the draft when the message is saved
  if (chat === from && field.value) keep(); // typed meanwhile
}

/**
 * Add files to the message, if they are text.
 * @param {Iterable<File>} given
 */
async function add(given) {
  for (const file of given) {
    const text = file.size <= MAX_FILE ? (await file.text()).replaceAll("\r", "") : "";
    if (file.size > MAX_FILE) toast(`${file.name} is larger than ${MAX_FILE / 1000} kB.`);
    else if (/[\0\ufffd]/.test(text)) toast(`${file.name} is not a text file; gpt-oss reads text only.`);
    else files = [...files, { name: file.name, text }];
  }
  changed();
  field.focus();
}

function listenForFiles() {
  const picker = $("file", HTMLInputElement);
  $("attach", HTMLButtonElement).addEventListener("click", () => picker.click());
  picker.addEventListener("change", () => add([...(picker.files ?? [])]).finally(() => (picker.value = "")));
  field.addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return;
    event.preventDefault();
    add([...event.clipboardData.files]);
  });
  const drop = $("drop", HTMLElement);
  const carries = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    drop.hidden = false;
  });
  addEventListener("dragleave", (event) => event.relatedTarget || (drop.hidden = true));
  addEventListener("drop", (event) => {
    drop.hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    add([...(event.dataTransfer?.files ?? [])]);
  });
}

/**
 * Begin; once.
 * @param {(draft: Draft) => Promise<void>} onSend resolves when the message is saved
 * @param {(chat: string, empty: boolean) => void} onDraft the draft of a chat changed
 */
export function startComposer(onSend, onDraft) {
  send = onSend;
  drafted = onDraft;
  sendButton.append(icon("send"));
  $("stop", HTMLButtonElement).append(icon("stop"));
  $("attach", HTMLButtonElement).append(icon("clip"));
  field.addEventListener("input", changed);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    submit();
  });
  $("composer", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  addEventListener("storage", (event) => event.key === DRAFT + chat && load(chat)); // another tab's typing
  listenForFiles();
}
