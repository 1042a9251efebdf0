// The list of chats: grouped by day, searched, renamed, exported, deleted and brought back.

import * as composer from "./composer.js";
import { $, el, icon, iconButton } from "./dom.js";
import { toast } from "./feedback.js";
import * as store from "./store.js";
import { hear } from "./tabs.js";
import { exportChat } from "./transfer.js";

/** @import { Conversation } from "./types.js" */

const list = $("list", HTMLElement);
const menu = $("menu", HTMLElement);
const field = $("search", HTMLInputElement);
/** @type {() => string} */
let shown = () => "";
/** @type {() => void} */
let begin = () => {};
let renaming = "";

/** @param {Conversation} one */
export function titleOf(one) {
  return one.title || composer.draftOf(one.id).text.trim().split("\n")[0]?.slice(0, 80) || "New chat";
}

/** @param {number} time */
function dayOf(time) {
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - time) / 86_400_000);
  if (days < 1) return "Today";
  if (days < 2) return "Yesterday";
  return days < 8 ? "Last 7 days" : new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}

let drawing = 0;
/** Draw the list anew, once for all changes of a moment. */
export function drawSoon() {
  clearTimeout(drawing);
  drawing = setTimeout(draw, 30);
}

async function draw() {
  const text = field.value.trim();
  const [all, found] = await Promise.all([store.conversations(), text ? store.search(text) : null]);
  if (renaming || field.value.trim() !== text) return;
  /** @type {Map<string, HTMLElement[]>} */
  const groups = new Map();
  for (const one of all) {
    if (found && !found.has(one.id)) continue;
    const day = dayOf(one.updated);
    groups.set(day, [...(groups.get(day) ?? []), row(one)]);
  }
  const rows = [...list.querySelectorAll("li")];
  const at = rows.findIndex((item) => item.contains(document.activeElement));
  const control = document.activeElement?.localName === "button" ? "button" : "a";
  const sections = [...groups].map(([day, rows]) => el("section", {}, el("h3", {}, day), el("ul", {}, ...rows)));
  const empty = text ? "Nothing found." : "Your chats will be listed here.";
  list.replaceChildren(...(sections.length ? sections : [el("p", { class: "hint" }, empty)]));
  if (at < 0) return;
  const now = [...list.querySelectorAll("li")];
  const same = now.find((item) => item.dataset.id === rows[at]?.dataset.id);
  const next = same?.querySelector(control) ?? now[Math.min(at, now.length - 1)]?.querySelector("a") ?? field;
  next.focus({ preventScroll: true });
}

/** @param {string} id */
const rowOf = (id) => list.querySelector(`li[data-id="${id}"]`);

/** @param {Conversation} one */
function row(one) {
  const title = titleOf(one);
  const link = el("a", { href: `#/${one.id}`, "aria-current": one.id === shown() ? "page" : null, title }, title);
  if (composer.hasDraft(one.id)) link.append(el("span", { class: "draft" }, "draft"));
  const more = iconButton("more", `Actions for ${title}`, () => openMenu(one, more));
  return el("li", { "data-id": one.id }, link, more);
}

/**
 * @param {Conversation} one
 * @param {HTMLElement} button
 */
function openMenu(one, button) {
  /**
   * @param {string} label
   * @param {() => void} act
   */
  const item = (label, act) => {
    const choose = () => {
      menu.hidePopover();
      act();
    };
    return el("button", { type: "button", onclick: choose }, label);
  };
  menu.replaceChildren(
    item("Rename", () => rename(one)),
    item("Export as Markdown", () => exportChat(one, "md")),
    item("Export as JSON", () => exportChat(one, "json")),
    item("Delete", () => remove(one)),
  );
  menu.showPopover();
  const at = button.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(at.left, innerWidth - menu.offsetWidth - 8))}px`;
  menu.style.top = `${Math.min(at.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.querySelector("button")?.focus();
}

/** @param {Conversation} one */
function rename(one) {
  const item = rowOf(one.id);
  if (!item) return;
  renaming = one.id;
  const input = el("input", { value: titleOf(one), "aria-label": "New name", maxlength: 120 });
  const end = async (/** @type {boolean} */ keep) => {
    if (!renaming) return;
    renaming = "";
    if (keep && input.value.trim()) await store.changeConversation({ id: one.id, title: input.value.trim() });
    await draw();
    rowOf(one.id)?.querySelector("a")?.focus();
  };
  input.addEventListener("blur", () => end(true));
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") end(true);
    if (event.key === "Escape") end(false);
  });
  item.replaceChildren(input);
  input.select();
}

/**
 * Delete a chat; it can be brought back for as long as the note is shown.
 * @param {Conversation} one
 */
export async function remove(one) {
  await store.changeConversation({ id: one.id, deleted: Date.now() });
  if (one.id === shown()) begin();
  drawSoon();
  toast(`Deleted “${titleOf(one).slice(0, 40)}”`, "Undo", async () => {
    await store.bringBack(one.id);
    location.hash = `#/${one.id}`;
    drawSoon();
  });
}

/**
 * Open or close the sidebar. On a narrow screen it lies over the page, which is then out of reach.
 * @param {boolean} [open] the other way round, if not given
 */
export function toggleSidebar(open) {
  const narrow = matchMedia("(max-width: 800px)").matches;
  const body = document.body.classList;
  const now = open ?? !(narrow ? body.contains("drawer-open") : !body.contains("side-closed"));
  body.toggle("drawer-open", narrow && now);
  if (!narrow) {
    body.toggle("side-closed", !now);
    localStorage.setItem("gptoss.side", now ? "open" : "closed");
  }
  $("sidebar", HTMLElement).inert = !now;
  $("main", HTMLElement).inert = narrow && now;
  $("open-side", HTMLButtonElement).setAttribute("aria-expanded", String(now));
}

/**
 * Begin; once.
 * @param {() => string} current the id of the chat that is shown
 * @param {() => void} startNew
 */
export function startSidebar(current, startNew) {
  shown = current;
  begin = startNew;
  field.addEventListener("input", drawSoon);
  for (const type of ["conversation", "message"]) hear(type, drawSoon);
  $("new", HTMLButtonElement).prepend(icon("pen"));
  $("new-top", HTMLButtonElement).append(icon("pen"));
  $("open-side", HTMLButtonElement).append(icon("menu"));
  $("close-side", HTMLButtonElement).append(icon("close"));
  const narrow = matchMedia("(max-width: 800px)");
  const closeNarrow = () => narrow.matches && toggleSidebar(false);
  const focusable = (/** @type {string} */ id) => $(id, HTMLButtonElement).focus();
  $("open-side", HTMLButtonElement).addEventListener("click", () => {
    toggleSidebar();
    if (narrow.matches) focusable("close-side");
  });
  $("close-side", HTMLButtonElement).addEventListener("click", () => {
    toggleSidebar(false);
    focusable("open-side");
  });
  $("shade", HTMLElement).addEventListener("click", closeNarrow);
  list.addEventListener("click", (event) => event.target instanceof HTMLAnchorElement && closeNarrow());
  for (const id of ["new", "new-top"])
    $(id, HTMLButtonElement).addEventListener("click", () => {
      startNew();
      closeNarrow();
    });
  const arrange = () => toggleSidebar(!narrow.matches && localStorage.getItem("gptoss.side") !== "closed");
  narrow.addEventListener("change", arrange);
  arrange();
  drawSoon();
}
