// What the tabs and windows of this browser tell each other.

/** @typedef {{ type: string, id: string, conversation?: string }} Note */

const channel = new BroadcastChannel("gptoss");
/** @type {Map<string, Set<(note: Note) => void>>} */
const listeners = new Map();
channel.addEventListener("message", (event) => {
  for (const listener of listeners.get(event.data.type) ?? []) listener(event.data);
});

/**
 * Tell the other tabs.
 * @param {Note} note
 */
export function tell(note) {
  channel.postMessage(note);
}

/**
 * Call back for each note of a type from another tab. Returns what ends that.
 * @param {string} type
 * @param {(note: Note) => void} listener
 */
export function hear(type, listener) {
  const all = listeners.get(type) ?? new Set();
  listeners.set(type, all.add(listener));
  return () => all.delete(listener);
}

/**
 * Whether another tab is writing this answer.
 * @param {string} id
 * @returns {Promise<boolean>}
 */
export function writtenElsewhere(id) {
  return new Promise((resolve) => {
    const end = hear("writing", (note) => note.id === id && settle(true));
    const timer = setTimeout(() => settle(false), 700);
    /** @param {boolean} answer */
    const settle = (answer) => {
      clearTimeout(timer);
      end();
      resolve(answer);
    };
    tell({ type: "writing?", id });
  });
}
