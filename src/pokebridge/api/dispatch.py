"""From an HTTP request to its response: the one place that every request passes.

Routing is a look-up of the path and one of the method. Only paths that end in a parameter are
compared in turn. What belongs to every call is here and nowhere else: limits, the caller, errors,
the headers for other origins, durations.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from time import perf_counter

from pokebridge.api.cors import Cors
from pokebridge.api.exchange import Request, Response, Route
from pokebridge.api.problems import defect, refusal
from pokebridge.asgi import Receive, Scope, Send
from pokebridge.border import note_unforeseen
from pokebridge.durations import RequestDurations
from pokebridge.errors import (
    AuthError,
    ForbiddenError,
    KeysUnavailableError,
    NotFoundError,
    PokebridgeError,
    RefusedError,
)
from pokebridge.tokens import Claims, TokenVerifier

# Callers can't make up labels.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})


class Api:
    """The ASGI application that answers ``routes``.

    - ``_verifier``: verifies the tokens of callers
    - ``_durations``: where the durations of requests are counted
    - ``_cors``: which pages may call from a browser
    - ``_limit_bytes``: the largest body, where the route has no limit of its own
    - ``_routes``: by path, and then by method
    - ``_below``: the same for paths that end in a parameter, by what is before it
    """

    def __init__(
        self,
        routes: Iterable[Route],
        verifier: TokenVerifier,
        durations: RequestDurations,
        *,
        allowed_origins: Sequence[str],
        limit_bytes: int,
    ) -> None:
        self._verifier = verifier
        self._durations = durations
        self._cors = Cors(allowed_origins)
        self._limit_bytes = limit_bytes
        self._routes: dict[str, dict[str, Route]] = {}
        self._below: dict[str, dict[str, Route]] = {}
        for route in routes:
            fixed, parameter, _ = route.path.partition("{")
            methods = (self._below if parameter else self._routes).setdefault(fixed, {})
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and count how long it took."""
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']!r}: this application answers HTTP requests only")
        began_s = perf_counter()
        request = Request(scope, receive, self._limit_bytes)
        response = await self._answer(request)
        headers = response.headers
        origin = request.headers.get(b"origin")
        if origin is not None:
            headers += self._cors.headers_for(origin)
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})
        method = request.method if request.method in _METHODS else "other"
        # The duration of a call that waits says nothing about the instance's speed.
        route = f"{request.route} waiting" if request.is_waiting else request.route
        durations = self._durations.by_labels[method, route, str(response.status)]
        durations.add(perf_counter() - began_s)

    async def _answer(self, request: Request) -> Response:
        """Answer, whatever happens: this is the guard between a request and the instance."""
        try:
            return self._cors.preflight(request) or await self._handle(request)
        except PokebridgeError as error:
            return refusal(error, request)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            note_unforeseen("api", error)  # a driver has cancelled what the handler awaits
        except Exception as error:  # noqa: BLE001 - a defect is answered too
            note_unforeseen("api", error)
        return defect()

    async def _handle(self, request: Request) -> Response:
        methods = self._routes.get(request.path) or self._find_below(request)
        route = methods.get(request.method)
        if route is None:
            raise _unknown(request, methods)
        request.route = route.label
        request.limit_bytes = route.limit_bytes or self._limit_bytes
        request.check_declared_length()
        if route.scope is not None:
            request.caller = await self._authorize(request, route.scope)
        return await route.handler(request)

    def _find_below(self, request: Request) -> Mapping[str, Route]:
        for fixed, methods in self._below.items():
            if request.path.startswith(fixed):
                request.rest = request.path[len(fixed) :]
                return methods
        return {}

    async def _authorize(self, request: Request, scope: str) -> Claims:
        """The caller, from the bearer token (RFC 6750, section 2.1), which must grant ``scope``."""
        scheme, _, token = request.header(b"authorization").partition(" ")
        if scheme.lower() != "bearer":
            raise AuthError("this call needs a token: Authorization: Bearer …")
        token = token.strip()
        try:
            claims = self._verifier.verify_now(token)
        except KeysUnavailableError:
            claims = await self._verifier.verify(token)  # fetches the key
        if scope and scope not in claims.scopes:
            raise ForbiddenError(f"the token lacks the scope {scope!r}")
        return claims


def _unknown(request: Request, methods: Mapping[str, Route]) -> PokebridgeError:
    """The error for a path that has no route, or has them for other methods only."""
    request.check_declared_length()
    if not methods:
        return NotFoundError("there is nothing at this path")
    request.route = next(iter(methods.values())).label
    allowed = ", ".join(sorted(methods))
    return RefusedError(
        HTTPStatus.METHOD_NOT_ALLOWED, f"this path takes {allowed}", {"Allow": allowed}
    )
