// Calls of the HTTP API, for what a page does beside listening.

const REQUEST_TIMEOUT_MS = 15_000;

/** Where the bridge is: this page's origin, and what a proxy may have before our paths. */
export const home = new URL(".", location.href).href.replace(/\/$/, "");

/** `fetch`, uncached, with a timeout, and with plain words when there is no answer. */
export async function reach(path, options) {
  try {
    const signal = AbortSignal.timeout(REQUEST_TIMEOUT_MS);
    return await fetch(home + path, { ...options, cache: "no-store", signal });
  } catch {
    throw new Error("the server does not answer");
  }
}

/** An answer that is not a success, with the server's own reason (RFC 9457). */
export class Refusal extends Error {
  static async of(response) {
    const problem = await response.json().catch(() => ({}));
    const refusal = new Refusal(problem.detail ?? `HTTP ${response.status}`);
    refusal.status = response.status;
    return refusal;
  }
}

/** A token that an instance with --dev makes. */
export async function devToken(claims) {
  const response = await reach("/v1/dev/token", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(claims),
  });
  if (!response.ok) throw await Refusal.of(response);
  return (await response.json()).token;
}

/** The calls of whoever `getToken` returns tokens of. */
export class Api {
  #getToken;
  #token = null;

  constructor(getToken) {
    this.#getToken = getToken;
  }

  /** A new token. */
  async renew() {
    this.#token = await this.#getToken();
    return this.#token;
  }

  /** The answer's JSON, or null without any. Throws a `Refusal` when the answer is not a success. */
  async call(method, path, body, mayRenew = true) {
    const token = this.#token ?? (await this.renew());
    const response = await reach(path, {
      method,
      headers: {
        Authorization: `Bearer ${token}`,
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
    this.onAnswer(method, path, response.status);
    if (response.status === 401 && mayRenew) {
      this.#token = null;
      return this.call(method, path, body, false);
    }
    if (!response.ok) throw await Refusal.of(response);
    const text = await response.text();
    return text ? JSON.parse(text) : null;
  }

  /** An answer has come; for whoever wants to show it. */
  onAnswer(_method, _path, _status) {}
}

/** Why the bridge has stopped a client for good, by its close code. */
export const whyStopped = (code) =>
  ({ 4403: "not allowed", 4409: "replaced by a newer session" })[code] ?? `closed ${code}`;
