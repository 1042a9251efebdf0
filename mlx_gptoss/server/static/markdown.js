// Markdown as the server renders it. The only module that makes HTML of a text; the server sanitised it.

import { request } from "./api.js";
import { el, icon } from "./dom.js";
import { copyFrom } from "./feedback.js";

/** @typedef {{ html: string, lines: number | null }} Block */
/** @typedef {{ text: string, name: string, growing?: boolean }} Text */

const PAUSE = 100; // milliseconds between two renderings of a text that grows
const BATCH = 20;
const policy = /** @type {any} */ (window).trustedTypes?.createPolicy("rendered", {
  createHTML: (/** @type {string} */ html) => html,
});

/**
 * @param {Text[]} texts
 * @returns {Promise<Block[][]>}
 */
async function render(texts) {
  const response = await request("/page/render", { body: { texts } });
  return (await response.json()).texts;
}

/** @type {Map<string, Promise<Block[]>>} */
const known = new Map();
/** @type {{ text: Text, resolve: (blocks: Block[]) => void, reject: (error: unknown) => void }[]} */
let waiting = [];

/**
 * The blocks of a finished text. Texts that are asked for at the same time share a request.
 * @param {Text} text
 * @returns {Promise<Block[]>}
 */
function blocksOf(text) {
  const key = `${text.name} ${text.text}`;
  const found = known.get(key);
  if (found) return found;
  /** @type {Promise<Block[]>} */
  const asked = new Promise((resolve, reject) => {
    if (!waiting.length) setTimeout(renderWaiting);
    waiting.push({ text, resolve, reject });
  });
  known.set(key, asked);
  asked.catch(() => known.delete(key));
  if (known.size > 500) known.delete(/** @type {string} */ (known.keys().next().value));
  return asked;
}

async function renderWaiting() {
  const all = waiting.reverse(); // the latest messages are those on the screen
  waiting = [];
  while (all.length) {
    const batch = all.splice(0, BATCH);
    try {
      const answers = await render(batch.map((one) => one.text));
      batch.forEach((one, index) => one.resolve(answers[index] ?? []));
    } catch (error) {
      for (const one of batch) one.reject(error);
    }
  }
}

/** @param {string} html */
function blockNode(html) {
  const node = el("div", { class: "block" });
  node.innerHTML = policy ? policy.createHTML(html) : html;
  for (const pre of node.querySelectorAll("pre")) {
    const language = pre.dataset.language || "text";
    const copy = el("button", { type: "button", "aria-label": "Copy code" }, icon("copy"), "Copy");
    copy.addEventListener("click", () => copyFrom(copy, pre.textContent ?? ""));
    const figure = el("figure", { class: "code" });
    pre.replaceWith(figure);
    pre.setAttribute("aria-label", `Code, ${language}`);
    figure.append(el("figcaption", {}, el("span", {}, language), copy), pre);
  }
  return node;
}

/** A text on the page, rendered block by block: what is finished is rendered and drawn once. */
export class Rendered {
  /**
   * @param {HTMLElement} target
   * @param {string} name unique on the page
   */
  constructor(target, name) {
    this.target = target;
    this.name = name;
    this.text = "";
    /** @type {{ html: string, node: HTMLElement }[]} */
    this.entries = [];
    this.settled = 0; // entries that are finished
    this.offset = 0; // where the text of the others begins
    this.busy = false;
    this.drawn = -PAUSE;
    this.final = false;
  }

  /**
   * The text so far, of which more will come.
   * @param {string} text
   */
  grow(text) {
    if (text === this.text) return;
    this.text = text;
    if (!this.busy) this.soon();
  }

  soon() {
    this.busy = true;
    setTimeout(() => this.step(), Math.max(0, this.drawn + PAUSE - performance.now()));
  }

  async step() {
    if (this.final) return;
    this.drawn = performance.now();
    const { text } = this;
    const rest = text.slice(this.offset);
    try {
      const [blocks = []] = await render([{ text: rest, name: this.name, growing: true }]);
      if (this.final) return;
      this.show(this.settled, blocks);
      const done = blocks.filter((block) => block.lines !== null);
      this.settled += done.length;
      this.offset += lengthOfLines(rest, done.at(-1)?.lines ?? 0);
    } catch {
      this.showPlain(rest, this.settled);
    }
    if (this.text !== text && !this.final) this.soon();
    else this.busy = false;
  }

  /**
   * The whole text: rendered at once, as notes and references may belong to earlier blocks.
   * @param {string} text
   */
  async finish(text) {
    if (this.final && text === this.text) return;
    this.final = true;
    this.text = text;
    const late = setTimeout(() => this.entries.length || this.showPlain(text, 0), 400);
    try {
      if (this.settled) {
        // What came last is shown before the whole is there, which takes longer.
        const [end = []] = await render([{ text: text.slice(this.offset), name: this.name, growing: true }]);
        if (this.text === text) this.show(this.settled, end);
      }
      const blocks = text ? await blocksOf({ text, name: this.name }) : [];
      clearTimeout(late);
      if (this.text === text) this.show(0, blocks);
    } catch {
      clearTimeout(late);
      this.showPlain(text, 0);
      this.final = false; // to be tried again
    }
  }

  /**
   * Show these blocks from an entry on, and nothing after them. What did not change stays as it is.
   * @param {number} from
   * @param {Block[]} blocks
   */
  show(from, blocks) {
    blocks.forEach(({ html }, index) => {
      const entry = this.entries[from + index];
      if (entry?.html === html) return;
      const node = blockNode(html);
      if (entry) entry.node.replaceWith(node);
      else this.target.append(node);
      this.entries[from + index] = { html, node };
    });
    for (const entry of this.entries.splice(from + blocks.length)) entry.node.remove();
  }

  /**
   * @param {string} text
   * @param {number} from
   */
  showPlain(text, from) {
    for (const entry of this.entries.splice(from)) entry.node.remove();
    const node = el("div", { class: "plain" }, text);
    this.target.append(node);
    this.entries[from] = { html: "", node };
  }
}

/**
 * How many characters the first lines of a text have, their ends included.
 * @param {string} text
 * @param {number} lines
 */
function lengthOfLines(text, lines) {
  let end = 0;
  for (let line = 0; line < lines; line++) end = text.indexOf("\n", end) + 1 || text.length;
  return end;
}
