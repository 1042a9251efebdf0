// The records of the page, as the browser keeps them.

/**
 * @typedef {object} Settings Of one chat; what is empty is left to the server.
 * @property {string} effort
 * @property {string} instructions
 * @property {number | null} temperature
 * @property {number | null} top_p
 * @property {number | null} max_tokens
 * @property {string} schema JSON
 * @property {string} tools JSON
 * @property {string[]} [served] tools that the server runs, by their ids
 */

/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title empty until it has one
 * @property {number} created
 * @property {number} updated
 * @property {string | null} leaf the last message of the branch that is shown
 * @property {Settings} settings
 * @property {number} [tokens] in the context after the last answer
 * @property {number} [deleted] when it was deleted; it can be brought back for a while
 */

/** @typedef {{ name: string, text: string }} TextFile */
/**
 * @typedef {object} Call
 * @property {string} id
 * @property {string} name
 * @property {string} arguments
 * @property {string} [result]
 * @property {string} [ran] its type, when the server ran it
 * @property {string} [server] whose tool it is; the server runs it when it is approved
 * @property {boolean} [approved]
 */
/** @typedef {{ prompt: number, cached: number, completion: number, reasoning: number }} Usage */

/**
 * @typedef {object} Message One node of a chat's tree. Only the tab that writes an answer changes it.
 * @property {string} id
 * @property {string} conversation
 * @property {string | null} parent
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {number} created
 * @property {"running" | "done" | "stopped" | "failed"} state
 * @property {TextFile[]} [files]
 * @property {string} [reasoning]
 * @property {Call[]} [calls]
 * @property {string} [error]
 * @property {{ read: number, cached: number, total: number }} [reading] tokens of the prompt, while it is read
 * @property {number} [thought] milliseconds of reasoning
 * @property {number} [first] milliseconds to the first token
 * @property {number} [writing] milliseconds from the first token to the last
 * @property {Usage} [usage]
 * @property {string} [finish]
 * @property {string} [model]
 */

export {};
