// Answers that this tab is writing: they go on whatever the page shows, and are saved as they come.

import { ApiError, events, request } from "./api.js";
import * as store from "./store.js";
import { hear, tell, writtenElsewhere } from "./tabs.js";
import { entries } from "./tools.js";

/** @import { Call, Conversation, Message } from "./types.js" */

const SAVE = 400; // milliseconds between two savings
const MAX_TOKENS = 16_384; // of an answer with its reasoning, where the chat's settings say nothing
/** @type {Map<string, { message: Message, control: AbortController }>} */
const running = new Map();
/** @type {(message: Message) => void} */
let changed = () => {};

/**
 * Be told of each change of an answer; there is one listener.
 * @param {(message: Message) => void} listener
 */
export function onChange(listener) {
  changed = listener;
}

hear("writing?", (note) => running.has(note.id) && tell({ type: "writing", id: note.id }));
hear("stop", (note) => running.get(note.id)?.control.abort());

/**
 * The answer as it is now, when this tab writes it.
 * @param {string} id
 */
export function beingWritten(id) {
  return running.get(id)?.message;
}

/**
 * Stop an answer, also one of another tab.
 * @param {string} id
 */
export function stop(id) {
  const mine = running.get(id);
  if (mine) mine.control.abort();
  else tell({ type: "stop", id });
}

/** Answers that nobody writes any more, because their tab was closed, are said to be broken off. */
export async function settleOrphans() {
  for (const message of await store.unfinished()) {
    if (running.has(message.id) || (await writtenElsewhere(message.id))) continue;
    const error = "The page was closed or reloaded before this answer was complete.";
    await store.saveMessage({ ...message, state: "failed", error });
  }
}

/**
 * Have the server answer. Resolves when the answer has ended, well or not.
 * @param {Conversation} conversation
 * @param {Message[]} before what leads to the answer
 * @param {Message} message the answer, which is filled in
 */
export async function write(conversation, before, message) {
  const control = new AbortController();
  running.set(message.id, { message, control });
  const failed = (/** @type {unknown} */ error) => {
    message.error = `This answer cannot be saved: ${error instanceof Error ? error.message : error}`;
  };
  let saved = Promise.resolve();
  const save = () => (saved = saved.then(() => store.saveMessage({ ...message })).catch(failed));
  await save();
  const timer = setInterval(save, SAVE);
  window.addEventListener("pagehide", save);
  const clock = { began: performance.now(), first: 0 };
  try {
    const body = requestBody(conversation, before);
    const response = await request("/v1/chat/completions", { body, signal: control.signal });
    for await (const data of events(response)) {
      take(message, data, clock);
      changed(message);
    }
    message.state = "done";
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") message.state = "stopped";
    else {
      message.state = "failed";
      message.error = error instanceof Error ? error.message : String(error);
      if (!(error instanceof ApiError)) console.error(error);
    }
  }
  delete message.reading;
  if (clock.first) message.writing = performance.now() - clock.first;
  clearInterval(timer);
  window.removeEventListener("pagehide", save);
  await save();
  running.delete(message.id);
  const { usage } = message;
  const tokens = usage ? { tokens: usage.prompt + usage.completion } : {};
  await store.changeConversation({ id: conversation.id, updated: Date.now(), ...tokens });
  changed(message);
}

/**
 * Add what came to the answer.
 * @param {Message} message
 * @param {any} data
 * @param {{ began: number, first: number }} clock
 */
function take(message, data, clock) {
  message.model = data.model;
  if (data.usage) {
    const { prompt_tokens: prompt, completion_tokens: completion } = data.usage;
    const cached = data.usage.prompt_tokens_details?.cached_tokens ?? 0;
    const reasoning = data.usage.completion_tokens_details?.reasoning_tokens ?? 0;
    message.usage = { prompt, completion, cached, reasoning };
  }
  const { prompt_progress: progress } = data;
  if (progress) message.reading = { read: progress.processed, cached: progress.cache, total: progress.total };
  const choice = data.choices[0];
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  const { reasoning, content, tool_calls: calls, executed_tools: executed } = choice?.delta ?? {};
  if (!reasoning && !content && !calls && !executed) return;
  const now = performance.now();
  if (!clock.first) {
    clock.first = now;
    message.first = now - clock.began;
    delete message.reading;
  }
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  else if (message.reasoning && message.thought === undefined) message.thought = now - clock.first;
  if (content) message.content += content.replaceAll("\r", "");
  for (const part of calls ?? []) takeCall((message.calls ??= []), part);
  for (const part of executed ?? []) takeExecuted(message, part);
}

/**
 * A call that the server runs, or its result.
 * @param {Message} message
 * @param {any} part
 */
function takeExecuted(message, { id, type, name, arguments: text, output }) {
  const calls = (message.calls ??= []);
  if (type) calls.push({ id, name, arguments: text, ran: type });
  const call = calls.find((one) => one.id === id);
  if (!call || typeof output !== "string") return;
  call.result = output;
  if (message.reasoning) message.reasoning += "\n\n"; // which goes on
}

/**
 * @param {Call[]} calls
 * @param {any} part
 */
function takeCall(calls, part) {
  if (part.id) calls.push({ id: part.id, name: "", arguments: "", ...(part.server_label && { server: part.server_label }) });
  const call = calls.at(-1);
  if (!call) return;
  call.name += part.function?.name ?? "";
  call.arguments += part.function?.arguments ?? "";
}

/**
 * The text of a person's message with the files in it.
 * @param {Message} message
 */
export function fullText(message) {
  const files = (message.files ?? []).map(({ name, text }) => {
    const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map((run) => run[0].length + 1)));
    return `File ${name}:\n\n${fence}${/\.(\w{1,12})$/.exec(name)?.[1] ?? ""}\n${text}\n${fence}`;
  });
  return [...files, message.content].filter(Boolean).join("\n\n");
}

/**
 * What the server is asked.
 * @param {Conversation} conversation
 * @param {Message[]} before
 */
function requestBody({ settings }, before) {
  /** @type {any[]} */
  const messages = settings.instructions ? [{ role: "system", content: settings.instructions }] : [];
  for (const message of before) {
    if (message.role === "user") messages.push({ role: "user", content: fullText(message) });
    else messages.push(...answerMessages(message, message === before.at(-1)));
  }
  const options = { stream: true, stream_options: { include_usage: true }, return_progress: true };
  /** @type {Record<string, unknown>} */
  const body = { messages, ...options, reasoning_effort: settings.effort, max_tokens: MAX_TOKENS };
  for (const name of /** @type {const} */ (["temperature", "top_p", "max_tokens"]))
    if (settings[name] !== null) body[name] = settings[name];
  if (settings.schema)
    body.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", schema: JSON.parse(settings.schema), strict: true },
    };
  const functions = settings.tools ? JSON.parse(settings.tools) : [];
  const tools = functions.map((/** @type {any} */ tool) => (tool.function ? tool : { type: "function", function: tool }));
  tools.push(...entries(settings.served ?? []));
  if (tools.length) body.tools = tools;
  return body;
}

/**
 * An earlier answer, with the results of its calls. One that ended before it said anything is left out, as is
 * what built-in tools gave, which was for the reasoning. The last may have calls that the server is to run.
 * @param {Message} message
 * @param {boolean} last
 */
function answerMessages({ content, reasoning = "", calls = [] }, last) {
  const ran = calls.filter((call) => call.ran === "mcp" && call.result !== undefined);
  const own = calls.filter((call) => !call.ran && (call.result !== undefined || (last && call.approved)));
  /** @type {any[]} */
  const messages = ran.flatMap((call) => [{ role: "assistant", content: "", tool_calls: [asked(call)] }, resultOf(call)]);
  if (own.length)
    messages.push(
      { role: "assistant", content, tool_calls: own.map(asked), ...(ran.length ? {} : { reasoning }) },
      ...own.filter((call) => call.result !== undefined).map(resultOf),
    );
  else if (content) messages.push({ role: "assistant", content });
  return messages;
}

/** @param {Call} call */
const asked = ({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } });
/**
 * @param {Call} call
 * @returns {any}
 */
const resultOf = (call) => ({ role: "tool", tool_call_id: call.id, content: call.result });
