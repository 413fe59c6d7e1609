"""Cross-origin requests: which pages may call from a browser (the Fetch standard's CORS)."""

import re
from collections.abc import Sequence
from http import HTTPStatus

from pokebridge.api.exchange import Header, Request, Response, header_list
from pokebridge.api.problems import problem
from pokebridge.origins import is_allowed

_METHODS = ("GET", "POST", "PUT", "DELETE")
_REQUEST_HEADERS = (
    *("Accept", "Accept-Language", "Authorization", "Content-Language", "Content-Type"),
    "If-None-Match",
)
_NAMES = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z, \t]*")
_EXPOSED: Header = (b"access-control-expose-headers", b"ETag, Retry-After")
_PREFLIGHT = {
    "Access-Control-Allow-Methods": ", ".join(_METHODS),
    "Access-Control-Max-Age": "600",
    "Vary": "Access-Control-Request-Method, Access-Control-Request-Headers, "
    "Access-Control-Request-Private-Network",
}


class Cors:
    """Lets pages of the ``allowed`` origins call, which are normal, or patterns; ``"*"``: any."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)
        self._allows_any = "*" in self._allowed

    def headers_for(self, origin: bytes) -> list[Header]:
        """What an answer to a page of ``origin`` has in addition."""
        if self._allows_any:
            return [(b"access-control-allow-origin", b"*"), _EXPOSED]
        if is_allowed(origin.decode("latin-1"), self._allowed):
            return [(b"access-control-allow-origin", origin), _EXPOSED]
        return [_EXPOSED]

    def preflight(self, request: Request) -> Response | None:
        """The answer to ``request`` if it asks whether a page may call; otherwise ``None``.

        An allowed page may send any header: tracing adds some by itself (traceparent, baggage,
        sentry-trace, …), and a program that is no browser may send any. A page that is allowed by
        name may also call a bridge in a private network. Where any page is allowed, the browser
        decides.
        """
        method = request.headers.get(b"access-control-request-method")
        if request.method != "OPTIONS" or method is None or b"origin" not in request.headers:
            return None
        asked = request.header(b"access-control-request-headers").strip()
        is_named = is_allowed(request.header(b"origin"), self._allowed)
        allowed = {
            "origin": self._allows_any or is_named,
            "method": method.decode("latin-1") in _METHODS,
            "headers": _NAMES.fullmatch(asked) is not None,
        }
        wrong = [name for name, is_allowed in allowed.items() if not is_allowed]
        if wrong:
            detail = f"Disallowed CORS {', '.join(wrong)}"
            return problem(HTTPStatus.BAD_REQUEST, detail, _PREFLIGHT)
        headers = {"Content-Type": "text/plain; charset=utf-8", **_PREFLIGHT}
        headers["Access-Control-Allow-Headers"] = asked or ", ".join(_REQUEST_HEADERS)
        if is_named and b"access-control-request-private-network" in request.headers:
            headers["Access-Control-Allow-Private-Network"] = "true"
        return Response(HTTPStatus.OK, header_list(headers), b"OK")
