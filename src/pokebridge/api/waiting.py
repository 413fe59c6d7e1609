"""Calls that wait, for clients whose network lets no WebSocket pass.

A call that waits is a session of the gateway: it counts in its limits and metrics, and a drain ends
it. This module has the calls that fetch and send a session's frames, and lets a pull wait for
something new.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import TypeVar

from msgspec import UNSET, Raw

from pokebridge.api import schema
from pokebridge.api.exchange import (
    Request,
    Response,
    Route,
    body_reader,
    json_response,
    no_content,
    read_query,
)
from pokebridge.api.openapi import Call
from pokebridge.api.pokes import POKES_CAP_BYTES
from pokebridge.errors import NotFoundError, RefusedError
from pokebridge.forwarded import forwarded_for
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.handshake import client_address
from pokebridge.gateway.polling import PolledSession
from pokebridge.model import DEFAULT_DEVICE, check_device
from pokebridge.wire import Listen

T = TypeVar("T")


class Waiting:
    """Lets calls wait, each as a session of ``gateway``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._read_frames = body_reader(schema.SentFrames)

    @property
    def ends_soon(self) -> bool:
        """Whether this instance is about to stop, so that the caller's next call goes elsewhere."""
        return self._gateway.draining

    async def read(
        self,
        request: Request,
        wait_s: float,
        read: Callable[[], Awaitable[T]],
        is_news: Callable[[T], bool],
    ) -> T:
        """What ``read`` returns: at once if that is new, else after a poke or ``wait_s`` seconds.

        On an instance without sessions it does not wait.

        Raises:
            RefusedError: nothing is new, and a limit forbids to wait.
            PokebridgeError: as of :meth:`~pokebridge.gateway.polling.PolledSession.read_when_new`.
        """
        if not self._gateway.entrance.serves:
            return await read()
        request.is_waiting = True
        try:
            polled = self._begin(request, DEFAULT_DEVICE, lasts=False, moved=True)
        except RefusedError:
            found = await read()
            if is_news(found):
                return found
            raise
        watch = _end_if_gone(request, polled)
        try:
            verify_every_s = self._gateway.verify_every_s
            return await polled.read_when_new(wait_s, verify_every_s, read, is_news)
        finally:
            watch.cancel()

    async def fetch(self, request: Request) -> Response:
        """GET /v1/pokes."""
        query = read_query(request, schema.PollQuery)
        request.is_waiting = query.wait_s > 0
        if query.session is UNSET:
            device = DEFAULT_DEVICE if query.device is UNSET else check_device(query.device)
            polled = self._begin(request, device, lasts=True, moved=query.moved)
        else:
            polled = self._find(request, query.session)
        watch = _end_if_gone(request, polled)
        try:
            frames = await polled.fetch(query.wait_s)
        finally:
            watch.cancel()
        close = None if polled.ending is None else schema.Close(*polled.ending)
        polled_frames = [Raw(frame) for frame in frames]
        return json_response(schema.Polled(polled.session.id, polled_frames, close))

    async def send(self, request: Request) -> Response:
        """POST /v1/pokes/frames."""
        query = read_query(request, schema.FramesQuery)
        sent = await self._read_frames(request)
        polled = self._find(request, query.session)
        for frame in sent.frames:
            if not polled.hear():
                break
            if isinstance(frame, Listen):
                self._gateway.entrance.listen(polled, frame)
            else:
                self._gateway.entrance.unlisten(polled, frame.recipient)
        return no_content()

    def _find(self, request: Request, session: str) -> PolledSession:
        polled = self._gateway.entrance.find_polled(session, request.caller)
        if polled is None:
            raise NotFoundError("there is no such session here: begin one without `session`")
        return polled

    def _begin(self, request: Request, device: str, *, lasts: bool, moved: bool) -> PolledSession:
        scope, gateway = request.scope, self._gateway
        peer = scope["client"][0] if scope.get("client") else ""
        address = client_address(peer, forwarded_for(scope["headers"]), gateway.trusted_proxies)
        return gateway.poll(request.caller, device, address, lasts=lasts, moved=moved)

    def routes(self) -> Iterable[Route]:
        """The calls for frames."""
        yield Call(
            "GET",
            "/v1/pokes",
            self.fetch,
            "Wait for pokes without a WebSocket",
            query=schema.PollQuery,
            answers={200: schema.Polled},
            problems=[HTTPStatus.NOT_FOUND, HTTPStatus.TOO_MANY_REQUESTS],
        )
        yield Call(
            "POST",
            "/v1/pokes/frames",
            self.send,
            "Listen to more recipients without a WebSocket",
            limit_bytes=POKES_CAP_BYTES,
            query=schema.FramesQuery,
            body=schema.SentFrames,
            answers={204: "The answers come with the next frames of the session."},
            problems=[HTTPStatus.NOT_FOUND],
        )


def _end_if_gone(request: Request, polled: PolledSession) -> asyncio.Task[None]:
    """End the session when the client of this call goes away: nobody will hear the answer."""

    async def watch() -> None:
        await request.until_gone()
        polled.abort()

    return asyncio.create_task(watch())
