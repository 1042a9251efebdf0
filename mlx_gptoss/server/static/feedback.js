// Telling the person that something happened: toasts, spoken notes, and copying.

import { $, el, icon } from "./dom.js";

/**
 * A short note at the bottom, with a button when something can be done about it.
 * @param {string} text
 * @param {string} [label]
 * @param {() => void} [action]
 */
export function toast(text, label, action) {
  const node = el("div", { class: "toast" }, el("span", {}, text));
  const end = () => {
    if (node.matches(":hover, :focus-within")) setTimeout(end, 2000);
    else node.remove();
  };
  setTimeout(end, action ? 12_000 : 5000);
  if (label && action) {
    const act = () => {
      node.remove();
      action();
    };
    node.append(el("button", { type: "button", onclick: act }, label));
  }
  $("toasts", HTMLElement).append(node);
}

/** What the latest note offers to do, if it offers anything. */
export function offered() {
  const button = [...document.querySelectorAll(".toast button")].at(-1);
  return button instanceof HTMLElement ? () => button.click() : undefined;
}

/**
 * A note for screen readers alone.
 * @param {string} text
 */
export function speak(text) {
  $("spoken", HTMLElement).textContent = text;
}

/**
 * Copy a text; also over plain http, where the clipboard's own interface is missing.
 * @param {string} text
 * @returns {Promise<boolean>}
 */
async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed here: the older way may be
    }
  }
  const before = document.activeElement;
  const field = el("textarea", { class: "hidden", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (before instanceof HTMLElement) before.focus();
  return done;
}

/**
 * Copy a text and show on the button that it is done.
 * @param {HTMLButtonElement} button
 * @param {string} text
 */
export async function copyFrom(button, text) {
  const copied = await copyText(text);
  if (!copied) return toast("The browser does not allow copying here.");
  speak("Copied");
  const before = [...button.childNodes];
  if (button.dataset.copied) return;
  button.dataset.copied = "true";
  button.replaceChildren(icon("check"), ...(button.classList.contains("icon") ? [] : ["Copied"]));
  setTimeout(() => {
    button.replaceChildren(...before);
    delete button.dataset.copied;
  }, 1500);
}
