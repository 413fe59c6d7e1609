"""The HTTP requests that one worker passes to its hub, because they concern the whole instance.

Among them are calls that wait for pokes: their sessions are the hub's, since a client may send each
call to another worker.
"""

import asyncio

from pokebridge.asgi import ASGIApp, Message
from pokebridge.workers.methods import HttpRequest, HttpResponse


class PassedRequests:
    """The requests of one worker, which ``app`` answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Of the requests under way, by their numbers: set when the client has gone away.
        self._gone: dict[int, asyncio.Event] = {}

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Answer ``request``."""
        gone = self._gone[request.number] = asyncio.Event()
        response, is_read = HttpResponse(500, [], b""), False

        async def receive() -> Message:
            nonlocal is_read
            if is_read:
                await gone.wait()
                return {"type": "http.disconnect"}
            is_read = True
            return {"type": "http.request", "body": request.body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                response.status, response.headers = message["status"], list(message["headers"])
            else:
                response.body += message.get("body", b"")

        scope = {name: getattr(request, name) for name in request.__struct_fields__}
        try:
            await self._app(scope | {"type": "http", "root_path": ""}, receive, send)
        finally:
            del self._gone[request.number]
        return response

    def end(self, number: int) -> None:
        """The client of a request has gone away."""
        if number in self._gone:
            self._gone[number].set()

    def end_all(self) -> None:
        """The worker has ended, and with it all its clients' connections."""
        for gone in self._gone.values():
            gone.set()
