// What is told about an answer: tokens, speed, and how it ended.

import { el } from "./dom.js";
import { server } from "./server.js";

/** @import { Message } from "./types.js" */

const ENDS = new Map([
  ["stop", "complete"],
  ["length", "cut off at the longest answer or the end of the context"],
  ["tool_calls", "waits for the result of a tool"],
]);
const LONG = 1000; // tokens of a prompt that take a while to be read
/** @param {number} value */
const count = (value) => value.toLocaleString("en");

/**
 * A time in words.
 * @param {number} milliseconds
 */
export function seconds(milliseconds) {
  if (milliseconds < 60_000) return `${(milliseconds / 1000).toFixed(milliseconds < 9950 ? 1 : 0)} s`;
  return `${Math.floor(milliseconds / 60_000)} min ${Math.round((milliseconds % 60_000) / 1000)} s`;
}

/**
 * How long the reasoning took.
 * @param {number} milliseconds
 */
export function thoughtFor(milliseconds) {
  return `Thought for ${milliseconds < 1000 ? "a moment" : seconds(milliseconds)}`;
}

/**
 * Tokens a second in words.
 * @param {number} rate
 */
export function perSecond(rate) {
  return `${rate < 100 ? rate.toFixed(1) : count(Math.round(rate))} tokens/s`;
}

/**
 * Tokens a second, or null while that means nothing.
 * @param {Message} message
 */
export function speed({ usage, writing }) {
  return usage && usage.completion > 1 && writing ? ((usage.completion - 1) / writing) * 1000 : null;
}

/**
 * How much of a long prompt is read; empty for one that takes no time.
 * @param {Message} message
 */
export function readSoFar({ reading }) {
  if (!reading || reading.total - reading.cached < LONG) return "";
  return `Reading the conversation: ${count(reading.read)} of ${count(reading.total)} tokens`;
}

/**
 * Why an answer that reached a limit ends where it does, and whether the model can go on.
 * @param {Message} message
 * @returns {{ text: string, more: boolean } | null}
 */
export function cutOff({ usage, content, finish, state }) {
  if (finish !== "length" || state !== "done") return null;
  const { context } = server();
  if (usage && context && usage.prompt + usage.completion >= context)
    return { text: `The context of ${count(context)} tokens is full. Begin a new chat, or edit an earlier message.`, more: false };
  const where = usage ? ` after ${count(usage.completion)} tokens` : "";
  if (content) return { text: `Cut off${where}, the longest answer that the settings allow.`, more: true };
  const cure = "Allow a longer answer in the settings, or less reasoning effort.";
  return { text: `Cut off${where}, before the reasoning came to an end. ${cure}`, more: false };
}

/**
 * A list of all that is known.
 * @param {Message} message
 */
export function detailList(message) {
  const { usage, first, finish, model, state } = message;
  const rate = speed(message);
  /** @type {[string, string | null | undefined][]} */
  const rows = [
    ["Model", model],
    ["Tokens", usage && `${count(usage.completion)} (${count(usage.reasoning)} of them reasoning)`],
    ["Speed", rate ? perSecond(rate) : null],
    ["First token after", first === undefined ? null : seconds(first)],
    ["Prompt", usage && `${count(usage.prompt)} tokens (${count(usage.cached)} from the cache)`],
    ["Ended", state === "stopped" ? "stopped by you" : finish && (ENDS.get(finish) ?? finish)],
    ["Written", new Date(message.created).toLocaleString()],
  ];
  const shown = rows.filter(([, value]) => value);
  return el("dl", { class: "details" }, ...shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}
