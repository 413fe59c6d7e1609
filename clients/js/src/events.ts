// The events that go into the client's core, and the actions that come out of it. The scenarios in
// tests/vectors/client use the same names. They hold every client of pokebridge to the same behaviour.

/** Something happened. A `reason` is for people; the core ignores it. */
export type Event =
  /** The client was started: the first event, once. */
  | { type: "start" }
  /** A token was fetched; connections, pulls and `authenticate` use it from now on. */
  | { type: "token" }
  | { type: "token_failed"; reason?: string }
  /** The handshake is done; `ready` is still to come. */
  | { type: "opened" }
  /** The socket brought a text message. */
  | { type: "text"; text: string }
  /** The socket closed, or could not be opened: then `code` is 1006. */
  | { type: "closed"; code: number; reason?: string }
  /** The handshake was answered with an HTTP status other than 101. */
  | { type: "refused"; status: number; retry_after_s?: number | null; reason?: string }
  /**
   * The pull succeeded: everything up to `cursor` is handled. `more`: more messages wait. `unacked`: the core has
   * to ack `cursor` over the socket.
   */
  | { type: "pulled"; cursor: number; more?: boolean; unacked?: boolean }
  /**
   * The pull or its handler failed. `unauthorized`: the token was refused. `cursor`: the version that the pull
   * reached before it failed.
   */
  | {
      type: "pull_failed";
      unauthorized?: boolean;
      retry_after_s?: number | null;
      cursor?: number | null;
      reason?: string;
    }
  /**
   * The WebSocket that `try` opened has received its first frame, `ready`. From now on it is the client's socket,
   * and polling ends.
   */
  | { type: "upgraded"; text: string }
  /** The WebSocket that `try` opened has failed. `opened`: it failed after its handshake. */
  | { type: "try_failed"; opened?: boolean; reason?: string }
  /** The network came back or the machine woke up: retry at once instead of waiting for a delay to end. */
  | { type: "wake" }
  /** The time is `timer`, or later. */
  | { type: "tick" };

/** Something to do now. */
export type Action =
  /** Get a new token; answer with `token` or `token_failed`. */
  | { type: "fetch_token" }
  /**
   * Open the socket; answer with `opened`, `refused` or `closed`. `poll`: poll the frames over HTTP. `in_query`: put
   * the token into the query, because a proxy refuses it elsewhere.
   */
  | { type: "connect"; url: string; moved: boolean; poll?: true; in_query?: true }
  /** Open a WebSocket while the client polls; answer with `upgraded` or `try_failed`. */
  | { type: "try"; url: string; in_query?: true }
  /** Drop the WebSocket that is being tried. It may cause no further event. */
  | { type: "abandon" }
  /** Drop the socket, whatever its state. It may cause no further event. */
  | { type: "disconnect" }
  /** Send a `ping` message. */
  | { type: "ping" }
  /** Send the token in an `auth` message. */
  | { type: "authenticate" }
  /** Send an `ack` message: this device has everything up to `version`. */
  | { type: "ack"; version: number }
  /** Pull what is newer than `after`; answer with `pulled` or `pull_failed`. */
  | { type: "pull"; after: number }
  /** The bridge has stopped this client for good; no other action follows. */
  | { type: "stop"; code: number };
