// The tools that the server runs, for the chats in which they are switched on.

import { request } from "./api.js";

/**
 * @typedef {object} Offer
 * @property {string} id
 * @property {string} title
 * @property {string} hint
 * @property {Record<string, unknown>} entry of a request's tools
 */

/** @type {Record<string, [string, string]>} */
const BUILTIN = {
  python: ["Python", "Runs code in a sandbox on the server."],
  browser: ["Pages", "Searches and reads the server's folder of pages."],
};
/** @type {Offer[]} */
let offers = [];

export const offered = () => offers;

/** Ask the server what it offers. */
export async function loadTools() {
  const { data } = await (await request("/v1/tools")).json();
  offers = data.map(offerOf);
}

/**
 * @param {any} tool as GET /v1/tools lists it
 * @returns {Offer}
 */
function offerOf({ type, name, server_label: label, tools, error }) {
  if (type !== "mcp") {
    const [title, hint] = BUILTIN[name] ?? [name, ""];
    return { id: name, title, hint, entry: { type } };
  }
  const names = (tools ?? []).map((/** @type {any} */ tool) => tool.name);
  const hint = error ?? names.join(", ");
  // What changes nothing runs at once; of the rest the server makes calls to be approved.
  return { id: `mcp:${label}`, title: label, hint, entry: { type, server_label: label, require_approval: "never" } };
}

/**
 * What a request says to have these tools.
 * @param {string[]} ids
 */
export const entries = (ids) => offers.filter(({ id }) => ids.includes(id)).map(({ entry }) => entry);
