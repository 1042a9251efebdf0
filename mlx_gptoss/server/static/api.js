// Talking to the server: the key, errors in words, and streams of events.

import { $ } from "./dom.js";

/** An error whose message can be shown as it is. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {boolean} [unreachable] nobody answered
   */
  constructor(message, unreachable = false) {
    super(message);
    this.unreachable = unreachable;
  }
}

let key = localStorage.getItem("gptoss.key") ?? sessionStorage.getItem("gptoss.key") ?? "";
/** @type {Promise<void> | null} */
let asking = null;

/**
 * Use a key from now on.
 * @param {string} value
 * @param {boolean} keep beyond this tab
 */
export function setKey(value, keep) {
  key = value.trim();
  (keep ? localStorage : sessionStorage).setItem("gptoss.key", key);
  if (!keep) localStorage.removeItem("gptoss.key");
}

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog", HTMLDialogElement);
    const done = () => {
      const field = $("key", HTMLInputElement);
      setKey(field.value, $("keep-key", HTMLInputElement).checked);
      field.value = "";
      asking = null;
      resolve();
    };
    dialog.addEventListener("close", done, { once: true });
    dialog.showModal();
  });
  return asking;
}

/**
 * A response of the server. Asks for the key when the server does.
 * @param {string} address
 * @param {{ body?: unknown, signal?: AbortSignal }} [options]
 * @returns {Promise<Response>}
 */
export async function request(address, { body, signal } = {}) {
  const used = key;
  /** @type {Record<string, string>} */
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body === undefined ? "GET" : "POST";
    response = await fetch(address, { method, headers, body: JSON.stringify(body), signal: signal ?? null });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", true);
  }
  if (response.status === 401) {
    if (used === key) await askForKey();
    return request(address, { body, ...(signal && { signal }) });
  }
  if (response.ok) return response;
  throw new ApiError(await reason(response));
}

/** @param {Response} response */
async function reason(response) {
  try {
    const { error } = await response.json();
    if (error?.message) return String(error.message);
  } catch {
    // not JSON: the status has to do
  }
  return `The server answered with error ${response.status}.`;
}

/**
 * The events of a streamed answer. Throws ApiError when it breaks off.
 * @param {Response} response
 * @returns {AsyncGenerator<any>}
 */
export async function* events(response) {
  const broken = new ApiError("The connection broke off before the answer was complete.", true);
  if (!response.body) throw broken;
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : broken;
    });
    if (done) throw broken;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop() ?? "";
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      const data = JSON.parse(part.slice(6));
      if (data.error) throw new ApiError(String(data.error.message));
      yield data;
    }
  }
}
