// Checks the bridge's address and the token, and tells the bridge's refusals (RFC 9457) from answers of others.

/**
 * An HTTP answer whose status was not expected, with the reason that the bridge gave (RFC 9457).
 *
 * A proxy or a login page on the way may answer with any status. Only an answer whose `isTheBridges` is true
 * says anything about the token.
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

/** @throws TypeError `url` is not a valid address. The error does not show `url`, which may hold a password. */
export function checkUrl(url: unknown): void {
  if (typeof url !== "string" || !/^https?:\/\/[^/?#@]+(\/[^?#]*)?$/.test(url)) {
    throw new TypeError("`url` must be the bridge's address, http://… or https://… without user, ? and #");
  }
}

/** Whether an HTTP header can hold `token`. If not, `fetch` would show the token in its error. */
export function isToken(token: unknown): token is string {
  return typeof token === "string" && /^[!-~]+$/.test(token);
}

/** Why the bridge refused with `status` (RFC 9457). Undefined if the answer does not come from the bridge. */
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
