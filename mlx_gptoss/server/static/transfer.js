// Chats as files: JSON, which can be read in again, and Markdown to read.

import { fullText } from "./answers.js";
import { el } from "./dom.js";
import { toast } from "./feedback.js";
import * as store from "./store.js";
import { latestLeaf, path } from "./tree.js";

/** @import { Conversation, Message } from "./types.js" */

const FORMAT = "mlx-gptoss-chats";

/**
 * @param {string} name
 * @param {string} type
 * @param {string} text
 */
function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {Conversation[]} chats */
async function asJson(chats) {
  const entries = chats.map(async (conversation) => {
    const messages = [...(await store.messages(conversation.id)).values()];
    return { conversation, messages };
  });
  return JSON.stringify({ format: FORMAT, version: 1, chats: await Promise.all(entries) }, null, 1);
}

/**
 * A chat's shown branch as Markdown.
 * @param {Conversation} chat
 * @param {Map<string, Message>} messages
 */
function asMarkdown(chat, messages) {
  const parts = [`# ${chat.title || "Chat"}`];
  if (chat.settings.instructions) parts.push(`> ${chat.settings.instructions.replaceAll("\n", "\n> ")}`);
  for (const message of path(messages, chat.leaf ?? latestLeaf(messages, null))) {
    parts.push(message.role === "user" ? "## You" : "## Assistant");
    if (message.role === "user") parts.push(fullText(message));
    else if (message.content) parts.push(message.content);
    for (const call of message.calls ?? []) {
      parts.push(`\`${call.name}\` was called with\n\n\`\`\`json\n${call.arguments}\n\`\`\``);
      if (call.result !== undefined) parts.push(`and gave\n\n\`\`\`\n${call.result}\n\`\`\``);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

/**
 * Download a chat.
 * @param {Conversation} chat
 * @param {"json" | "md"} kind
 */
export async function exportChat(chat, kind) {
  const name = (chat.title || "chat").replace(/[^\p{L}\p{N} ._-]+/gu, "").trim().slice(0, 60) || "chat";
  if (kind === "json") download(`${name}.json`, "application/json", await asJson([chat]));
  else download(`${name}.md`, "text/markdown", asMarkdown(chat, await store.messages(chat.id)));
}

/** Download all chats. */
export async function exportAll() {
  download("chats.json", "application/json", await asJson(await store.conversations()));
}

/**
 * A conversation of a file, with every field of the right type. Throws where it is not one.
 * @param {any} one
 * @returns {Conversation}
 */
function checkedConversation(one) {
  const { id, title, created, updated, leaf, settings = {} } = one;
  if (typeof id !== "string" || typeof title !== "string" || typeof updated !== "number") throw new Error();
  const text = (/** @type {string} */ name) => (typeof settings[name] === "string" ? settings[name] : "");
  const number = (/** @type {string} */ name) => (typeof settings[name] === "number" ? settings[name] : null);
  return {
    id,
    title,
    created: typeof created === "number" ? created : updated,
    updated,
    leaf: typeof leaf === "string" ? leaf : null,
    settings: {
      effort: ["low", "medium", "high"].includes(settings.effort) ? settings.effort : "medium",
      instructions: text("instructions"),
      temperature: number("temperature"),
      top_p: number("top_p"),
      max_tokens: number("max_tokens"),
      schema: text("schema"),
      tools: text("tools"),
      served: [], // whose file it is does not switch on what this server may do
    },
  };
}

/**
 * @param {any} one
 * @param {string} conversation
 * @returns {Message}
 */
function checkedMessage(one, conversation) {
  const right = typeof one.id === "string" && typeof one.content === "string" && ["user", "assistant"].includes(one.role);
  if (!right || !(one.parent === null || typeof one.parent === "string")) throw new Error();
  const files = (one.files ?? []).map((/** @type {any} */ file) => ({ name: String(file.name), text: String(file.text) }));
  const state = one.state === "running" ? "stopped" : one.state;
  return { ...one, conversation, files, state, created: Number(one.created) || 0 };
}

/**
 * Read chats from a file of exportAll or exportChat. One that is here already is completed, not doubled.
 * @param {File} file
 */
export async function importFile(file) {
  let chats;
  try {
    const data = JSON.parse(await file.text());
    if (data.format !== FORMAT) throw new Error();
    chats = data.chats.map((/** @type {any} */ chat) => {
      const conversation = checkedConversation(chat.conversation);
      return { conversation, messages: chat.messages.map((/** @type {any} */ one) => checkedMessage(one, conversation.id)) };
    });
  } catch {
    toast(`${file.name} is not a file of chats that this page exported as JSON.`);
    return;
  }
  for (const { conversation, messages } of chats) {
    const known = await store.messages(conversation.id);
    for (const message of messages) if (!known.has(message.id)) await store.saveMessage(message);
    await store.changeConversation({ id: conversation.id, deleted: 0 }, conversation);
  }
  toast(`Imported ${chats.length} ${chats.length === 1 ? "chat" : "chats"}.`);
}
