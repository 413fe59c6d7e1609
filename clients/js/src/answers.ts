// What the bridge is called with, what it answers when it refuses (RFC 9457), and what is no answer of the bridge.

/**
 * An HTTP answer with another status than expected, with the reason that the bridge gave (RFC 9457).
 *
 * What stands between, a proxy or a login page, may answer with any status. Only what `isTheBridges` says
 * anything about the token.
 */
export class HttpError extends Error {
  readonly isTheBridges: boolean;

  constructor(
    url: string,
    readonly status: number,
    readonly retry_after_s: number | undefined,
    detail: string | undefined,
  ) {
    super(`${url} answered ${status}${detail === undefined ? ", but not as an instance of pokebridge" : `: ${detail}`}`);
    this.isTheBridges = detail !== undefined;
  }
}

/** @throws TypeError `url` is not the bridge's address. The text shows nothing of it, as a password may be in it. */
export function checkUrl(url: unknown): void {
  if (typeof url !== "string" || !/^https?:\/\/[^/?#@]+(\/[^?#]*)?$/.test(url)) {
    throw new TypeError("`url` must be the bridge's address, http://… or https://… without user, ? and #");
  }
}

/** Whether `token` can be in an HTTP header. `fetch` would show any other in its error. */
export function isToken(token: unknown): token is string {
  return typeof token === "string" && /^[!-~]+$/.test(token);
}

/** Why the bridge refused with `status` (RFC 9457); undefined if the answer is not the bridge's. */
export function problemDetail(status: number, type: string | null, text: string): string | undefined {
  if (type?.split(";")[0]!.trim().toLowerCase() !== "application/problem+json") return undefined;
  try {
    const problem = JSON.parse(text);
    const isProblem = ["type", "title", "detail"].every((name) => typeof problem[name] === "string");
    return isProblem && problem.status === status ? problem.detail : undefined;
  } catch {
    return undefined;
  }
}
