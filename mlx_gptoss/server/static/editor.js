// Editing an earlier message in its place; what is typed outlives a reload.

import { el } from "./dom.js";

/** @import { MessageView } from "./message.js" */

const EDIT = "gptoss.edit.";

/**
 * Whether a message was being edited when the page was left.
 * @param {string} id
 */
export function isEdited(id) {
  return localStorage.getItem(EDIT + id) !== null;
}

/**
 * Put a field in the message's place. Returns it, or undefined when it is there already.
 * @param {MessageView} view
 * @param {(text: string, close: () => void) => void} send
 */
export function openEditor(view, send) {
  if (view.node.querySelector(".editor")) return undefined;
  const key = EDIT + view.message.id;
  const field = el("textarea", { rows: 3, "aria-label": "Edit the message" });
  field.value = localStorage.getItem(key) ?? view.message.content;
  const close = () => {
    localStorage.removeItem(key);
    editor.remove();
    view.node.classList.remove("editing");
  };
  const cancel = () => {
    close();
    const button = view.node.querySelector('[aria-label="Edit"]');
    if (button instanceof HTMLElement) button.focus();
  };
  const submit = () => {
    const text = field.value.trim();
    if (text) send(text, close);
  };
  field.addEventListener("input", () => localStorage.setItem(key, field.value));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  const editor = el("div", { class: "editor" }, field);
  const buttons = [
    el("button", { type: "button", onclick: cancel }, "Cancel"),
    el("button", { type: "button", class: "primary", onclick: submit }, "Send"),
  ];
  editor.append(el("div", { class: "buttons" }, ...buttons));
  view.node.classList.add("editing");
  view.node.append(editor);
  return field;
}
