// A room that both users may join: one more recipient, on the socket that each of them has.

import { devToken } from "../shared/api.js";

/** Its name: with --dev what begins with urn:group: is a group, whose messages stay for all its readers. */
export const ROOM = "urn:group:lobby";
const TOKEN_TTL_S = 3600;

/**
 * A user's place in the room.
 *
 * - `#root`, `#show`: the user's card, and what shows a message there
 * - `#listening`: hears the room; null while the user has not joined
 * - `#token`: the room's token, which its pulls have instead of the user's
 */
export class Room {
  #root;
  #show;
  #listening = null;
  #token = "";

  constructor(root, show) {
    this.#root = root;
    this.#show = show;
  }

  /** Listen on `client` if the user wants to be in the room, and no longer on an earlier one. */
  enter(client, cursorKey) {
    this.#listening?.close();
    this.#listening = null;
    const joined = this.#find(".join").checked;
    this.#find(".to-room").hidden = !joined;
    this.#find(".room-state").textContent = "";
    if (!joined || !["connecting", "connected"].includes(client.state)) return;
    const listening = client.listen(ROOM, {
      token: async () => {
        this.#token = await devToken({ sub: ROOM, ttl_s: TOKEN_TTL_S });
        return this.#token;
      },
      cursor: Number(localStorage.getItem(cursorKey)),
      onMessages: (messages) => {
        messages.forEach(this.#show);
        localStorage.setItem(cursorKey, messages.at(-1).version);
      },
    });
    this.#listening = listening;
    listening.on("state", (state) => {
      if (listening === this.#listening) this.#find(".room-state").textContent = state;
    });
  }

  /** Whether a request is about the room, by its token. */
  asked({ headers }) {
    return this.#token !== "" && headers?.Authorization === `Bearer ${this.#token}`;
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }
}
