"""The HTTP requests of a worker: it answers some itself, and passes the others to its hub."""

import asyncio
from collections.abc import Sequence
from itertools import count

from pokebridge.api.app import BODY_CAP_BYTES
from pokebridge.api.dispatch import Api
from pokebridge.api.exchange import Route
from pokebridge.api.pokes import POKES_CAP_BYTES
from pokebridge.api.problems import problem
from pokebridge.asgi import Receive, Scope, Send
from pokebridge.durations import RequestDurations
from pokebridge.errors import PokebridgeError
from pokebridge.tokens import TokenVerifier
from pokebridge.workers import methods
from pokebridge.workers.calls import Calls
from pokebridge.workers.channel import Channel
from pokebridge.workers.frames import Body, Gone, ToWorker
from pokebridge.workers.methods import HttpRequest, HttpResponse


class App:
    """The ASGI application of a worker.

    - ``_calls``, ``_channel``: to the hub
    - ``_answered``: method and path of the calls that are answered here
    - ``_api``: answers them
    - ``_numbers``: of the requests that are passed on
    - ``_wanted``: of those, set when the hub wants the body
    """

    def __init__(
        self,
        routes: Sequence[Route],
        verifier: TokenVerifier,
        requests: RequestDurations,
        calls: Calls,
        channel: Channel[ToWorker],
        *,
        allowed_origins: Sequence[str],
    ) -> None:
        self._calls = calls
        self._channel = channel
        self._answered = frozenset((route.method, route.path) for route in routes)
        self._api = Api(
            routes,
            verifier,
            requests,
            allowed_origins=allowed_origins,
            limit_bytes=BODY_CAP_BYTES,
        )
        self._numbers = count()
        self._wanted: dict[int, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request here, or have the hub answer it."""
        query = scope["query_string"]
        # The sessions of calls that wait are the hub's.
        may_wait = scope["method"] == "GET" and (b"wait_s" in query or b"%" in query)
        if (scope["method"], scope["path"]) in self._answered and not may_wait:
            await self._api(scope, receive, send)
            return
        request = HttpRequest(
            next(self._numbers), **{name: scope[name] for name in _SCOPE}, has_body=_has_body(scope)
        )
        try:
            response = await self._pass_on(request, receive)
        except PokebridgeError as error:
            refused = problem(error.status, str(error))
            response = HttpResponse(refused.status, refused.headers, refused.body)
        start = {"status": response.status, "headers": response.headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": response.body})

    def bring(self, number: int) -> None:
        """The hub wants the body of a request."""
        if number in self._wanted:
            self._wanted[number].set()

    async def _pass_on(self, request: HttpRequest, receive: Receive) -> HttpResponse:
        self._wanted[request.number] = asyncio.Event()
        answer = asyncio.ensure_future(self._calls.call(methods.HTTP, request))
        listening = asyncio.ensure_future(self._listen(request, receive))
        try:
            return await answer
        finally:
            listening.cancel()
            answer.cancel()
            del self._wanted[request.number]

    async def _listen(self, request: HttpRequest, receive: Receive) -> None:
        """Send the hub the body when it wants that, and tell it when the client goes away."""
        if request.has_body:
            await self._wanted[request.number].wait()
        body = await _read_body(receive)
        if body is not None:
            if request.has_body:
                await self._channel.room()
                self._channel.send(Body(request.number, body))
            while (await receive())["type"] != "http.disconnect":
                pass
        # The call may be waiting for room as well, and the hub must hear of it first.
        await self._channel.room()
        self._channel.send(Gone(request.number))


def _has_body(scope: Scope) -> bool:
    return any(name in {b"content-length", b"transfer-encoding"} for name, _ in scope["headers"])


_SCOPE = (
    *("method", "path", "raw_path", "query_string", "scheme", "http_version"),
    *("headers", "client", "server"),
)


async def _read_body(receive: Receive) -> bytes | None:
    """Read the body, or enough of it for the hub to see that it is too large for any call.

    ``None``: the client went away before it had sent all of it.
    """
    body, more = b"", True
    while more and len(body) <= POKES_CAP_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body
