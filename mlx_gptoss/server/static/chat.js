// The chat that is shown: its messages, and what a person does with them.

import * as answers from "./answers.js";
import * as composer from "./composer.js";
import { $, newId } from "./dom.js";
import { isEdited, openEditor } from "./editor.js";
import { speak, toast } from "./feedback.js";
import { MessageView } from "./message.js";
import { toEnd } from "./scrolling.js";
import * as store from "./store.js";
import { hear } from "./tabs.js";
import { children, latestLeaf, path } from "./tree.js";

/** @import { Call, Conversation, Message, Settings } from "./types.js" */

const log = $("log", HTMLElement);
/** @type {Conversation} */
let chat = blank(newId());
/** @type {Map<string, Message>} */
let messages = new Map();
/** @type {Map<string, MessageView>} */
const views = new Map();
/** @type {() => void} */
let drawn = () => {};

/**
 * A chat that is not in the store yet.
 * @param {string} id
 * @returns {Conversation}
 */
function blank(id) {
  const effort = localStorage.getItem("gptoss.effort") ?? "medium";
  /** @type {Settings} */
  const settings = { effort, instructions: "", temperature: null, top_p: null, max_tokens: null, schema: "", tools: "", served: [] };
  return { id, title: "", created: Date.now(), updated: Date.now(), leaf: null, settings };
}

export const current = () => chat;
export const shownPath = () => path(messages, chat.leaf);
/** The answer at the end, while it is being written, here or in another tab. */
export const runningAnswer = () => shownPath().find((message) => message.state === "running");

/** Resolves when the chat that was asked for last is shown. */
let opening = Promise.resolve();

/**
 * Show a chat; one that is not known is empty.
 * @param {string} id
 */
export function open(id) {
  composer.load(id); // at once: what is typed meanwhile is this chat's
  return (opening = show(id));
}

/** @param {string} id */
async function show(id) {
  const [found, all] = await Promise.all([store.conversation(id), store.messages(id)]);
  if (location.hash !== `#/${id}`) return; // another was opened meanwhile
  chat = found ?? blank(id);
  messages = all;
  for (const key of all.keys()) messages.set(key, answers.beingWritten(key) ?? /** @type {Message} */ (all.get(key)));
  if (!chat.leaf || !messages.has(chat.leaf)) chat.leaf = latestLeaf(messages, null);
  views.clear();
  draw();
  toEnd();
  composer.focus();
}

/** Read again what other tabs may have changed. */
export async function refresh() {
  await opening;
  const { id } = chat;
  const [found, all] = await Promise.all([store.conversation(id), store.messages(id)]);
  if (chat.id !== id) return;
  for (const [key, message] of all) if (!answers.beingWritten(key)) messages.set(key, message);
  if (found) {
    const { leaf } = chat;
    const follows = found.leaf && (!leaf || path(messages, found.leaf).some((message) => message.id === leaf));
    chat = { ...found, leaf: follows ? found.leaf : leaf };
  }
  draw();
}

let refreshing = 0;
function refreshSoon() {
  clearTimeout(refreshing);
  refreshing = setTimeout(refresh, 100);
}

/** Show the messages as they are now. */
export function draw() {
  const shown = shownPath();
  const nodes = shown.map((message, index) => {
    const view = views.get(message.id) ?? new MessageView(message, actions);
    views.set(message.id, view);
    const siblings = children(messages, message.parent);
    view.update(message, { index: siblings.indexOf(message), count: siblings.length, last: index === shown.length - 1 });
    if (isEdited(message.id)) edit(view);
    return view.node;
  });
  if (nodes.length !== log.children.length || nodes.some((node, index) => log.children[index] !== node))
    log.replaceChildren(...nodes);
  $("empty", HTMLElement).hidden = shown.length > 0;
  composer.setBusy(Boolean(runningAnswer()));
  drawn();
}

let frame = 0;
/** @param {Message} message */
function answerChanged(message) {
  if (message.conversation !== chat.id) return drawn();
  messages.set(message.id, message);
  const ended = message.state !== "running";
  if (ended) {
    draw();
    speak(message.error ?? "The answer is complete.");
  } else if (!frame)
    frame = requestAnimationFrame(() => {
      frame = 0;
      const view = views.get(message.id);
      if (view?.node.isConnected) view.grow(message);
      else draw();
    });
}

/**
 * @param {Partial<Message> & Pick<Message, "role" | "parent" | "state">} fields
 * @returns {Message}
 */
function newMessage(fields) {
  return { id: newId(), conversation: chat.id, content: "", created: Date.now(), ...fields };
}

/** Put the chat into the store, if it is not there. Who writes in a chat that another tab deleted keeps it. */
async function keep() {
  await store.changeConversation({ id: chat.id, deleted: 0 }, chat);
}

/** @param {composer.Draft} draft */
async function send({ text, files }) {
  await opening;
  const asked = newMessage({ role: "user", parent: chat.leaf, state: "done", content: text, files });
  await ask(asked, () => composer.forgetDraft(asked.conversation));
}

/**
 * Add a person's message and have it answered. Resolves when it is saved.
 * @param {Message} asked
 * @param {() => void} saved called as soon as it is
 */
async function ask(asked, saved) {
  messages.set(asked.id, asked);
  await keep();
  await store.saveMessage(asked);
  saved();
  const title = chat.title || (asked.content || asked.files?.[0]?.name || "").trim().split("\n")[0]?.slice(0, 80);
  chat = { ...chat, title: title ?? "" };
  await store.changeConversation({ id: chat.id, title: chat.title });
  await answerTo(asked.id);
  toEnd();
}

/**
 * Begin an answer below a message. `again` is an answer without content, to be written anew.
 * @param {string | null} parent
 * @param {Message} [again]
 */
async function answerTo(parent, again) {
  const answer = newMessage({ role: "assistant", parent, state: "running" });
  if (again) answer.id = again.id;
  const before = path(messages, parent);
  messages.set(answer.id, answer);
  views.delete(answer.id);
  chat = { ...chat, leaf: answer.id, updated: Date.now() };
  const writing = answers.write(chat, before, answer);
  await store.changeConversation({ id: chat.id, leaf: chat.leaf, updated: chat.updated });
  draw();
  writing.then(refreshSoon, (error) => toast(String(error)));
}

/** @param {MessageView} view */
function edit(view) {
  const { message } = view;
  return openEditor(view, async (text, close) => {
    if (runningAnswer()) return toast("An answer is being written: stop it, or wait for its end.");
    const { parent, files = [] } = message;
    await ask(newMessage({ role: "user", parent, state: "done", content: text, files }), close);
  });
}

const actions = {
  /** @param {Message} message */
  edit(message) {
    const view = views.get(message.id);
    if (view) edit(view)?.focus();
  },
  /** @param {Message} message */
  again(message) {
    if (runningAnswer()) return;
    const empty = !message.content && !message.reasoning && !message.calls?.length;
    answerTo(message.parent, empty ? message : undefined);
  },
  /** @param {Message} message an answer that was cut off */
  more(message) {
    if (runningAnswer()) return;
    ask(newMessage({ role: "user", parent: message.id, state: "done", content: "Continue." }), () => {});
  },
  /**
   * @param {Message} message
   * @param {number} step
   */
  async turn(message, step) {
    const siblings = children(messages, message.parent);
    const other = siblings[siblings.findIndex((one) => one.id === message.id) + step];
    if (!other) return;
    chat = { ...chat, leaf: latestLeaf(messages, other.id) };
    draw();
    const buttons = [...(views.get(other.id)?.node.querySelectorAll(".branch button:enabled") ?? [])];
    const button = buttons.at(step < 0 ? 0 : -1); // the same way on, while there is one
    if (button instanceof HTMLElement) button.focus();
    await store.changeConversation({ id: chat.id, leaf: chat.leaf });
  },
  /**
   * @param {Message} message
   * @param {Call} call
   * @param {Pick<Call, "result" | "approved">} settled
   */
  async settle(message, call, settled) {
    const calls = (message.calls ?? []).map((one) => (one.id === call.id ? { ...one, ...settled } : one));
    const changed = { ...message, calls };
    await store.saveMessage(changed);
    messages.set(message.id, changed); // only now: what was read from the store meanwhile did not know it
    if (calls.every((one) => one.result !== undefined || one.approved)) await answerTo(message.id);
    else draw();
  },
};

/**
 * Change the settings of the chat.
 * @param {Partial<Settings>} fields
 */
export async function setSettings(fields) {
  chat = { ...chat, settings: { ...chat.settings, ...fields } };
  await store.changeConversation({ id: chat.id, settings: chat.settings }, chat);
  drawn();
}

/** Edit the last message of the person. */
export function editLast() {
  const last = shownPath().findLast((message) => message.role === "user");
  if (last) actions.edit(last);
}

export function stopAnswer() {
  const running = runningAnswer();
  if (running) answers.stop(running.id);
}

/**
 * Begin; once.
 * @param {() => void} onDraw
 */
export function startChat(onDraw) {
  drawn = onDraw;
  answers.onChange(answerChanged);
  composer.startComposer(send, async (id, empty) => {
    if (id !== chat.id || messages.size) await (empty || store.bringBack(id));
    else await (empty && !chat.title && !(await store.messages(id)).size ? store.erase(id) : keep());
    drawn();
  });
  $("stop", HTMLButtonElement).addEventListener("click", stopAnswer);
  hear("message", (note) => note.conversation === chat.id && refreshSoon());
  hear("conversation", (note) => note.id === chat.id && refreshSoon());
  setInterval(() => {
    const running = runningAnswer();
    if (running && !answers.beingWritten(running.id)) answers.settleOrphans().then(refreshSoon);
  }, 3000);
}
