// One message on the page. It is updated in place as its answer grows.

import { fullText } from "./answers.js";
import { cutOff, detailList, perSecond, readSoFar, speed, thoughtFor } from "./details.js";
import { el, icon, iconButton } from "./dom.js";
import { copyFrom } from "./feedback.js";
import { Rendered } from "./markdown.js";

/** @import { Call, Message } from "./types.js" */

/**
 * @typedef {object} Actions What a message's buttons do.
 * @property {(message: Message) => void} edit
 * @property {(message: Message) => void} again
 * @property {(message: Message) => void} more go on where it was cut off
 * @property {(message: Message, step: number) => void} turn to a branch beside this one
 * @property {(message: Message, call: Call, settled: Pick<Call, "result" | "approved">) => void} settle
 */
/** @typedef {{ index: number, count: number, last: boolean }} Place among its branches; last of the chat */

const REFUSED = "error: the user did not allow this call";

/** A message and its elements. */
export class MessageView {
  /**
   * @param {Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    const user = message.role === "user";
    this.actions = actions;
    this.message = message;
    this.body = el("div", { class: "body" });
    this.reasoning = new ReasoningView();
    this.ran = el("div", { class: "calls" }); // by the server, before the text
    this.calls = el("div", { class: "calls" });
    this.error = el("div", { class: "failure", role: "alert" });
    this.bar = el("div", { class: "acts" });
    this.read = el("span", { class: "read" });
    this.wait = el("div", { class: "wait" }, el("span", { class: "dot" }), this.read);
    this.rendered = new Rendered(this.body, message.id);
    const label = user ? "You" : "Assistant";
    this.node = el("article", { class: `turn ${message.role}`, "aria-label": label, "data-id": message.id });
    this.node.append(el("h2", { class: "hidden" }, user ? "You said" : "Answer"));
    if (user) this.node.append(this.userText(message), this.bar);
    else this.node.append(this.reasoning.node, this.ran, this.body, this.calls, this.wait, this.error, this.bar);
    this.drawn = "";
  }

  /** @param {Message} message */
  userText(message) {
    const files = (message.files ?? []).map(({ name, text }) =>
      el("details", { class: "attached" }, el("summary", {}, icon("file"), name), el("pre", { tabindex: 0 }, text)),
    );
    this.body.textContent = message.content;
    return el("div", { class: "said" }, ...files, message.content ? this.body : null);
  }

  /**
   * Show the message as it is now.
   * @param {Message} message
   * @param {Place} place
   */
  update(message, place) {
    this.message = message;
    const running = message.state === "running";
    if (message.role === "assistant") {
      this.grow(message);
      if (!running) this.rendered.finish(message.content);
      this.node.setAttribute("aria-busy", String(running));
    }
    // The rest is drawn when it changed, not with every token.
    const now = JSON.stringify([message.state, message.error, message.usage, message.calls, place]);
    if (now === this.drawn) return;
    this.drawn = now;
    this.drawCalls(message, place.last && !running);
    this.error.replaceChildren(...this.failure(message, place.last));
    this.bar.replaceChildren(...(running ? [] : this.buttons(message, place)));
  }

  /**
   * Show what came of an answer, as often as the screen is drawn.
   * @param {Message} message
   */
  grow(message) {
    const running = message.state === "running";
    this.reasoning.update(message);
    if (running) this.rendered.grow(message.content);
    this.wait.hidden = !running || Boolean(message.reasoning || message.content || message.calls?.length);
    const read = readSoFar(message);
    if (this.read.textContent !== read) this.read.textContent = read;
    if (running && message.calls?.length) this.drawCalls(message, false);
  }

  /**
   * @param {Message} message
   * @param {boolean} open whether results can be given
   */
  drawCalls({ calls = [] }, open) {
    this.ran.replaceChildren(...calls.filter((call) => call.ran).map((call) => this.callNode(call, false)));
    this.calls.replaceChildren(...calls.filter((call) => !call.ran).map((call) => this.callNode(call, open)));
  }

  /**
   * @param {Message} message
   * @param {boolean} last
   */
  failure(message, last) {
    if (message.state === "stopped" && !message.content && !message.calls?.length)
      return [el("p", { class: "stopped" }, "Stopped.")];
    const cut = cutOff(message);
    if (cut) {
      const more = el("button", { type: "button", onclick: () => this.actions.more(message) }, "Continue");
      return [el("p", { class: "stopped" }, cut.text), ...(last && cut.more ? [more] : [])];
    }
    if (!message.error) return [];
    const retry = el("button", { type: "button", onclick: () => this.actions.again(message) }, icon("again"), "Retry");
    return [el("p", {}, message.error), ...(last ? [retry] : [])];
  }

  /**
   * @param {Message} message
   * @param {Place} place
   */
  buttons(message, { index, count, last }) {
    const { actions } = this;
    const nodes = [];
    if (count > 1) {
      const before = iconButton("left", "Earlier version", () => actions.turn(message, -1));
      const after = iconButton("right", "Later version", () => actions.turn(message, 1));
      before.disabled = index === 0;
      after.disabled = index === count - 1;
      nodes.push(el("span", { class: "branch" }, before, `${index + 1}/${count}`, after));
    }
    const copy = iconButton("copy", "Copy", () => copyFrom(copy, fullText(message)));
    nodes.push(copy);
    if (message.role === "user") return [...nodes, iconButton("pen", "Edit", () => actions.edit(message))];
    if (!message.error || !last) nodes.push(iconButton("again", "Answer again", () => actions.again(message)));
    const shown = el("div", { class: "detail-box", hidden: true });
    const info = iconButton("info", "Details", () => {
      shown.hidden = !shown.hidden;
      info.setAttribute("aria-expanded", String(!shown.hidden));
      shown.replaceChildren(detailList(this.message));
    });
    info.setAttribute("aria-expanded", "false");
    const rate = speed(message);
    return [...nodes, info, el("span", { class: "rate" }, rate ? perSecond(rate) : ""), shown];
  }

  /**
   * A call of a tool with its arguments and result, or a field for the result.
   * @param {Call} call
   * @param {boolean} open whether a result can be given
   */
  callNode(call, open) {
    const waiting = open && call.result === undefined && !call.approved;
    const node = el("details", { class: "call", open: waiting || call.result === undefined });
    node.append(el("summary", {}, "Calls ", el("code", {}, call.name)));
    node.append(el("pre", { tabindex: 0, "aria-label": "Arguments" }, pretty(call.arguments)));
    if (call.result !== undefined)
      node.append(el("p", {}, "Result"), el("pre", { tabindex: 0, "aria-label": "Result" }, pretty(call.result)));
    if (!waiting) return node;
    if (call.server) {
      const run = el("button", { type: "button", class: "primary", onclick: () => this.actions.settle(this.message, call, { approved: true }) }, "Run it");
      const refuse = () => this.actions.settle(this.message, call, { result: REFUSED });
      const asks = el("p", {}, `This tool of ${call.server} may change something.`);
      node.append(asks, el("div", { class: "buttons" }, el("button", { type: "button", onclick: refuse }, "Do not run it"), run));
      return node;
    }
    const field = el("textarea", { rows: 2, "aria-label": `Result of ${call.name}`, placeholder: "What the tool answers" });
    const send = () => this.actions.settle(this.message, call, { result: field.value });
    node.append(field, el("button", { type: "button", class: "primary", onclick: send }, "Give the result"));
    return node;
  }
}

/** The reasoning before an answer: open and scrolling while it comes, folded after. */
class ReasoningView {
  constructor() {
    this.label = el("span", {}, "");
    this.text = el("div", { class: "thoughts", tabindex: 0, role: "group", "aria-label": "Reasoning" });
    this.node = el("details", { class: "reasoning", hidden: true }, el("summary", {}, this.label), this.text);
    this.shown = 0;
    this.active = false;
  }

  /** @param {Message} message */
  update({ reasoning = "", thought, state, content }) {
    this.node.hidden = !reasoning;
    const active = Boolean(reasoning) && thought === undefined && state === "running" && !content;
    if (reasoning.length > this.shown) {
      const below = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight;
      this.text.append(reasoning.slice(this.shown));
      this.shown = reasoning.length;
      if (active && below < 30) this.text.scrollTop = this.text.scrollHeight;
    }
    if (active !== this.active) this.node.open = active;
    this.active = active;
    this.node.classList.toggle("active", active);
    const label = active ? "Thinking…" : thought === undefined ? "Thoughts" : thoughtFor(thought);
    if (this.label.textContent !== label) this.label.textContent = label;
  }
}

/**
 * JSON on lines of its own; what is not JSON as it is.
 * @param {string} text
 */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
