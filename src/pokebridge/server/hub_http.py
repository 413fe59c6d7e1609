"""The HTTP requests that one worker passes to its hub, because they concern the whole instance.

Among them are calls that wait for pokes: their sessions are the hub's, since a client may send each
call to another worker.
"""

import asyncio
from collections.abc import Callable, Coroutine

from pokebridge.asgi import IN_TIME, ASGIApp, Message
from pokebridge.workers.methods import HttpRequest, HttpResponse


class PassedRequests:
    """The requests of one worker, which ``app`` answers.

    ``want`` has the worker send the body of a request. That is called when the app reads it, so a
    request that is refused by its head costs no more.
    """

    def __init__(self, app: ASGIApp, want: Callable[[int], None]) -> None:
        self._app = app
        self._want = want
        # Those under way, by their numbers.
        self._under_way: dict[int, _UnderWay] = {}

    def answer(self, request: HttpRequest) -> Coroutine[None, None, HttpResponse]:
        """Answer ``request``.

        It counts as under way at once: its client may be gone before the coroutine begins.
        """
        state = self._under_way[request.number] = _UnderWay(None if request.has_body else b"")
        return self._answer(request, state)

    async def _answer(self, request: HttpRequest, state: "_UnderWay") -> HttpResponse:
        response, is_read = HttpResponse(500, [], b""), False

        async def receive() -> Message:
            nonlocal is_read
            if state.body is None:
                self._want(request.number)
            while (is_read or state.body is None) and not state.is_gone:
                state.changed.clear()
                await state.changed.wait()
            if is_read or state.body is None:
                return {"type": "http.disconnect"}
            is_read = True
            return {"type": "http.request", "body": state.body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                response.status, response.headers = message["status"], list(message["headers"])
            else:
                response.body += message.get("body", b"")

        scope = {name: getattr(request, name) for name in request.__struct_fields__}
        scope |= {"type": "http", "root_path": "", "extensions": _EXTENSIONS}
        try:
            await self._app(scope, receive, send)
        finally:
            del self._under_way[request.number]
        return response

    def take_body(self, number: int, body: bytes) -> None:
        """The body of a request has arrived."""
        if number in self._under_way:
            self._under_way[number].body = body
            self._under_way[number].changed.set()

    def end(self, number: int) -> None:
        """The client of a request has gone away."""
        if number in self._under_way:
            self._under_way[number].end()

    def end_all(self) -> None:
        """The worker has ended, and with it all its clients' connections."""
        for state in self._under_way.values():
            state.end()


# The worker's server limits the time.
_EXTENSIONS: dict[str, dict[str, str]] = {IN_TIME: {}}


class _UnderWay:
    """A request: its body once it is here, and whether its client has gone away."""

    def __init__(self, body: bytes | None) -> None:
        self.body = body
        self.is_gone = False
        self.changed = asyncio.Event()

    def end(self) -> None:
        self.is_gone = True
        self.changed.set()
