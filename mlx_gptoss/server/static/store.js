// Conversations and messages in IndexedDB. Each record has a key of its own, and a change reads and writes
// within one transaction, so tabs never overwrite each other's.

import { tell } from "./tabs.js";

/** @import { Conversation, Message } from "./types.js" */

const KEPT_DELETED = 24 * 3600 * 1000;
/** @type {Promise<IDBDatabase> | null} */
let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("gptoss", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      const messages = request.result.createObjectStore("messages", { keyPath: "id" });
      messages.createIndex("conversation", "conversation");
      messages.createIndex("state", "state");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/**
 * Run one transaction; resolves with the result of the request that `work` returns, once all is written.
 * @template T
 * @param {"readonly" | "readwrite"} mode
 * @param {(store: (name: string) => IDBObjectStore) => IDBRequest<T> | { result: T }} work
 * @returns {Promise<T>}
 */
async function transact(mode, work) {
  const db = await database();
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(["conversations", "messages"], mode);
    const request = work((name) => transaction.objectStore(name));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error ?? new Error("The browser's storage is full."));
  });
}

/** @returns {Promise<Conversation[]>} those not deleted, the latest first */
export async function conversations() {
  /** @type {Conversation[]} */
  const all = await transact("readonly", (store) => store("conversations").getAll());
  return all.filter((one) => !one.deleted).sort((a, b) => b.updated - a.updated);
}

/**
 * @param {string} id
 * @returns {Promise<Conversation | undefined>}
 */
export function conversation(id) {
  return transact("readonly", (store) => store("conversations").get(id));
}

/**
 * All messages of a conversation, by their ids.
 * @param {string} id
 * @returns {Promise<Map<string, Message>>}
 */
export async function messages(id) {
  /** @type {Message[]} */
  const all = await transact("readonly", (store) => store("messages").index("conversation").getAll(id));
  return new Map(all.map((message) => [message.id, message]));
}

/** @returns {Promise<Message[]>} */
export function unfinished() {
  return transact("readonly", (store) => store("messages").index("state").getAll("running"));
}

/**
 * Change fields of a record, or add it where it is missing. Resolves with the record as it now is.
 * @template {{ id: string }} T
 * @param {string} name
 * @param {Partial<T> & { id: string }} fields
 * @param {T} [otherwise] the record to begin with; without it a missing record stays missing
 * @returns {Promise<T | undefined>}
 */
function change(name, fields, otherwise) {
  return transact("readwrite", (store) => {
    const done = { result: /** @type {T | undefined} */ (undefined) };
    const request = store(name).get(fields.id);
    request.onsuccess = () => {
      const before = request.result ?? otherwise;
      if (!before) return;
      done.result = { ...before, ...fields };
      store(name).put(done.result);
    };
    return done;
  });
}

/**
 * Change a conversation's fields.
 * @param {Partial<Conversation> & { id: string }} fields
 * @param {Conversation} [otherwise]
 */
export async function changeConversation(fields, otherwise) {
  const now = await change("conversations", fields, otherwise);
  tell({ type: "conversation", id: fields.id });
  return now;
}

/**
 * Undo that a conversation was deleted.
 * @param {string} id
 */
export async function bringBack(id) {
  if ((await conversation(id))?.deleted) await changeConversation({ id, deleted: 0 });
}

/**
 * Add a message, or change its fields.
 * @param {Message} message
 */
export async function saveMessage(message) {
  await change("messages", message, message);
  tell({ type: "message", id: message.id, conversation: message.conversation });
}

/**
 * Remove a conversation for good.
 * @param {string} id
 */
export async function erase(id) {
  const all = await messages(id);
  await transact("readwrite", (store) => {
    for (const message of all.keys()) store("messages").delete(message);
    return store("conversations").delete(id);
  });
  tell({ type: "conversation", id });
}

/** Remove what was deleted longer ago than it can be brought back. */
export async function eraseOld() {
  /** @type {Conversation[]} */
  const all = await transact("readonly", (store) => store("conversations").getAll());
  const old = all.filter((one) => one.deleted && Date.now() - one.deleted > KEPT_DELETED);
  for (const one of old) await erase(one.id);
}

/**
 * The conversations that have a text in their title or a message.
 * @param {string} text
 * @returns {Promise<Set<string>>}
 */
export async function search(text) {
  const wanted = text.toLowerCase();
  /** @type {Set<string>} */
  const found = new Set();
  for (const one of await conversations()) if (one.title.toLowerCase().includes(wanted)) found.add(one.id);
  await transact("readonly", (store) => {
    const request = store("messages").openCursor();
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor) return;
      if (cursor.value.content.toLowerCase().includes(wanted)) found.add(cursor.value.conversation);
      cursor.continue();
    };
    return request;
  });
  return found;
}
