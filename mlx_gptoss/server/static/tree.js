// A conversation's messages as a tree: an edit or another answer begins a branch beside the earlier one.

/** @import { Message } from "./types.js" */
/** @typedef {Map<string, Message>} Messages */

/**
 * The messages from the first to a leaf.
 * @param {Messages} messages
 * @param {string | null} leaf
 */
export function path(messages, leaf) {
  /** @type {Message[]} */
  const found = [];
  for (let id = leaf; id; ) {
    const message = messages.get(id);
    if (!message || found.includes(message)) break;
    found.unshift(message);
    id = message.parent;
  }
  return found;
}

/**
 * The messages with the same parent, in the order in which they came.
 * @param {Messages} messages
 * @param {string | null} parent
 */
export function children(messages, parent) {
  const found = [...messages.values()].filter((message) => message.parent === parent);
  return found.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/**
 * The last message of the latest branch below a message; of the whole tree for null.
 * @param {Messages} messages
 * @param {string | null} id
 * @returns {string | null}
 */
export function latestLeaf(messages, id) {
  const below = children(messages, id).at(-1);
  return below ? latestLeaf(messages, below.id) : id;
}
