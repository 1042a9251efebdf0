// Following an answer as it grows, until the person scrolls up.

import { $, icon } from "./dom.js";

const box = $("scroll", HTMLElement);
const button = $("latest", HTMLButtonElement);
const NEAR = 60; // pixels from the end that count as being there
let following = true;
let before = { top: 0, height: 0 };

/** Show the end, and follow it from now on. */
export function toEnd() {
  following = true;
  box.scrollTop = box.scrollHeight;
}

function look() {
  const below = box.scrollHeight - box.scrollTop - box.clientHeight;
  const shrunk = box.scrollHeight < before.height; // which also moves what is seen
  if (below < NEAR) following = true;
  else if (box.scrollTop < before.top - 1 && !shrunk) following = false;
  before = { top: box.scrollTop, height: box.scrollHeight };
  button.hidden = following || below < NEAR;
}

/** Begin to watch; once. */
export function watchScrolling() {
  button.append(icon("down"));
  button.addEventListener("click", toEnd);
  box.addEventListener("scroll", look, { passive: true });
  const grown = new ResizeObserver(() => {
    if (following) box.scrollTop = box.scrollHeight;
    else look();
  });
  grown.observe($("log", HTMLElement));
  grown.observe(box);
}
