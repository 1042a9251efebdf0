// The drawer with a chat's settings, and those of this browser.

import * as chat from "./chat.js";
import { $, el, icon } from "./dom.js";
import { offered } from "./tools.js";
import { exportAll, importFile } from "./transfer.js";

const dialog = $("settings", HTMLDialogElement);
const error = $("set-error", HTMLElement);
const NUMBERS = /** @type {const} */ (["temperature", "top_p", "max_tokens"]);
const efforts = [$("effort", HTMLSelectElement), $("set-effort", HTMLSelectElement)];

/** Show the settings of the chat. */
export function drawSettings() {
  const { settings } = chat.current();
  for (const select of efforts) select.value = settings.effort;
  drawServed(settings.served ?? []);
  if (dialog.open) return; // what is being typed stays
  $("set-instructions", HTMLTextAreaElement).value = settings.instructions;
  $("set-schema", HTMLTextAreaElement).value = settings.schema;
  $("set-tools", HTMLTextAreaElement).value = settings.tools;
  for (const name of NUMBERS) $(`set-${name}`, HTMLInputElement).value = String(settings[name] ?? "");
}

let drawnOffers = "";
/**
 * A switch for each tool that the server offers.
 * @param {string[]} on
 */
function drawServed(on) {
  const box = $("served", HTMLFieldSetElement);
  const offers = offered();
  box.hidden = !offers.length;
  if (drawnOffers !== (drawnOffers = JSON.stringify(offers)))
    box.replaceChildren(
      el("legend", {}, "Tools that the server runs"),
      ...offers.map(({ id, title, hint }) =>
        el("label", { class: "check" }, el("input", { type: "checkbox", value: id }), el("span", {}, title, el("small", {}, hint))),
      ),
    );
  for (const input of box.querySelectorAll("input")) input.checked = on.includes(input.value);
}

/** What is switched on; what the server does not offer now stays as it was. */
function listenForServed() {
  const box = $("served", HTMLFieldSetElement);
  box.addEventListener("change", () => {
    const inputs = [...box.querySelectorAll("input")];
    const other = (chat.current().settings.served ?? []).filter((id) => !inputs.some((input) => input.value === id));
    chat.setSettings({ served: [...other, ...inputs.filter((input) => input.checked).map((input) => input.value)] });
  });
}

export function openSettings() {
  drawSettings();
  error.textContent = "";
  dialog.showModal();
}

/**
 * What is wrong with a text that should be JSON; null when nothing is.
 * @param {string} name
 * @param {string} text
 */
function wrong(name, text) {
  if (!text.trim()) return null;
  try {
    const value = JSON.parse(text);
    if (name === "tools" && !Array.isArray(value)) return "Tools: expected a list, [ … ].";
    if (name === "tools" && value.some((/** @type {any} */ tool) => !(tool?.name ?? tool?.function?.name)))
      return "Tools: each needs a name.";
    if (name === "schema" && (typeof value !== "object" || value === null)) return "JSON schema: expected an object, { … }.";
  } catch (problem) {
    return `${name === "tools" ? "Tools" : "JSON schema"}: ${problem instanceof Error ? problem.message : problem}`;
  }
  return null;
}

/** @param {"schema" | "tools"} name */
function listenForJson(name) {
  const field = $(`set-${name}`, HTMLTextAreaElement);
  field.addEventListener("change", () => {
    const problem = wrong(name, field.value);
    field.setAttribute("aria-invalid", String(problem !== null));
    error.textContent = problem ?? "";
    if (problem === null) chat.setSettings({ [name]: field.value.trim() });
  });
}

/** @param {typeof NUMBERS[number]} name */
function listenForNumber(name) {
  const field = $(`set-${name}`, HTMLInputElement);
  field.addEventListener("change", () => {
    error.textContent = field.validity.valid ? "" : field.validationMessage;
    if (field.validity.valid) chat.setSettings({ [name]: field.value === "" ? null : Number(field.value) });
  });
}

/** @param {string} name */
function setTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
}

/** Begin; once. */
export function startSettings() {
  $("tune", HTMLButtonElement).append(icon("tune"));
  for (const id of ["tune", "options"]) $(id, HTMLButtonElement).addEventListener("click", openSettings);
  for (const button of document.querySelectorAll("dialog .close")) button.append(icon("close"));
  for (const select of efforts)
    select.addEventListener("change", () => {
      localStorage.setItem("gptoss.effort", select.value); // new chats begin with it
      chat.setSettings({ effort: select.value });
    });
  const instructions = $("set-instructions", HTMLTextAreaElement);
  instructions.addEventListener("change", () => chat.setSettings({ instructions: instructions.value.trim() }));
  listenForJson("schema");
  listenForJson("tools");
  listenForServed();
  NUMBERS.forEach(listenForNumber);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

  const theme = $("theme", HTMLSelectElement);
  theme.value = localStorage.getItem("gptoss.theme") ?? "system";
  setTheme(theme.value);
  theme.addEventListener("change", () => {
    localStorage.setItem("gptoss.theme", theme.value);
    setTheme(theme.value);
  });
  const picker = $("import-file", HTMLInputElement);
  $("export-all", HTMLButtonElement).addEventListener("click", exportAll);
  $("import", HTMLButtonElement).addEventListener("click", () => picker.click());
  picker.addEventListener("change", async () => {
    const file = picker.files?.[0];
    if (file) await importFile(file);
    picker.value = "";
    await chat.refresh(); // what is shown may have been completed
  });
}
