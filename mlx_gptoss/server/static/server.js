// Whether the server is there, and what model it has.

import { request } from "./api.js";
import { $ } from "./dom.js";
import { loadTools } from "./tools.js";

const state = { model: "", context: 0, status: "connecting" };
/** @type {() => void} */
let changed = () => {};
let timer = 0;

export const server = () => state;

/** @param {Partial<typeof state>} fields */
function set(fields) {
  Object.assign(state, fields);
  const { status, model } = state;
  const words = { connecting: "connecting…", loading: "loading the model…", gone: "no connection", ready: model }[status];
  const label = $("model", HTMLElement);
  if (label.textContent !== words) label.textContent = words ?? "";
  document.body.dataset.server = status;
  changed();
}

/** Look now, and again later: soon while it is not ready. */
export async function look() {
  clearTimeout(timer);
  let pause = 10_000;
  try {
    const { status } = await (await fetch("/health")).json();
    if (status === "loading") set({ status: "loading" });
    else if (!state.model || state.status !== "ready") {
      const { data } = await (await request("/v1/models")).json();
      set({ status: "ready", model: data[0].id, context: data[0].max_model_len });
      loadTools().then(changed, console.error);
    }
    if (status === "loading") pause = 1000;
  } catch {
    set({ status: "gone" });
    pause = 2000;
  }
  clearTimeout(timer);
  timer = setTimeout(look, pause);
}

/**
 * Begin; once.
 * @param {() => void} onChange
 */
export function watchServer(onChange) {
  changed = onChange;
  for (const event of ["online", "focus"]) addEventListener(event, look);
  look();
}
