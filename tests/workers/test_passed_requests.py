"""The requests that a worker passes to its hub, over a real channel."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from pokebridge.api.pokes import POKES_CAP_BYTES
from pokebridge.asgi import ASGIApp, Message, Receive, Scope, Send
from pokebridge.durations import RequestDurations
from pokebridge.server.hub_http import PassedRequests
from pokebridge.server.worker_http import App
from pokebridge.tokens import TokenVerifier
from pokebridge.workers import methods
from pokebridge.workers.channel import CONGESTED_BYTES
from pokebridge.workers.frames import Body, Gone, Want
from tests.gateway.harness import SECRET
from tests.workers.ends import Ends

_PIECE = b"x" * 32 * 1024


@dataclass
class Caller:
    """A client that sends ``pieces``, then stays or goes away, and what it was answered."""

    pieces: int
    goes_away: bool = False
    status: list[int] = field(default_factory=list)

    async def receive(self) -> Message:
        """What arrives next."""
        if not self.pieces:
            if self.goes_away:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
        self.pieces -= 1
        is_more = self.pieces > 0 or self.goes_away
        return {"type": "http.request", "body": _PIECE, "more_body": is_more}

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        if "status" in message:
            self.status.append(message["status"])


def worker_app(ends: Ends, hub_app: ASGIApp) -> App:
    """A worker's application, whose hub answers with ``hub_app``."""

    def on_hub_heard(message: Any) -> None:
        if isinstance(message, Body):
            requests.take_body(message.number, message.body)
        elif isinstance(message, Gone):
            requests.end(message.number)

    def on_worker_heard(message: Any) -> None:
        assert isinstance(message, Want)
        app.bring(message.number)

    requests = PassedRequests(hub_app, lambda number: ends.hub.send(Want(number)))
    ends.answers.offer(methods.HTTP, requests.answer)
    ends.on_hub_heard, ends.on_worker_heard = on_hub_heard, on_worker_heard
    app = App(
        (),
        TokenVerifier(secret=SECRET),
        RequestDurations(),
        ends.calls,
        ends.worker,
        allowed_origins=(),
    )
    return app


def scope(*headers: tuple[bytes, bytes]) -> Scope:
    """A request that concerns the whole instance."""
    path = "/v1/pokes/frames"
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [*headers],
        "client": None,
        "server": None,
    }


CHUNKED = (b"transfer-encoding", b"chunked")


async def answer(status: int, send: Send) -> None:
    """Answer with ``status``."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize("pieces", [1, 4, POKES_CAP_BYTES // len(_PIECE)])
async def test_a_body_arrives_whole_however_it_is_cut(ends: Ends, pieces: int) -> None:
    """The hub gets all of a body that any of its calls may accept."""
    passed = []

    async def count_bytes(_: Scope, receive: Receive, send: Send) -> None:
        passed.append(len((await receive())["body"]))
        await answer(204, send)

    caller = Caller(pieces)
    await worker_app(ends, count_bytes)(scope(CHUNKED), caller.receive, caller.send)
    assert (passed, caller.status) == ([pieces * len(_PIECE)], [204])


async def test_a_body_that_nobody_wants_is_not_read(ends: Ends) -> None:
    """A request without a token, or that is too large by its head, costs no memory."""

    async def refuse(_: Scope, receive: Receive, send: Send) -> None:
        await answer(401, send)

    caller = Caller(4)
    await worker_app(ends, refuse)(scope(CHUNKED), caller.receive, caller.send)
    assert (caller.status, caller.pieces) == ([401], 4)
    assert ends.hub_heard == []


@pytest.mark.parametrize("unsent", [b"", b"x" * 4 * CONGESTED_BYTES], ids=["free", "congested"])
@pytest.mark.parametrize("headers", [(), (CHUNKED,)])
async def test_the_hub_hears_that_a_client_is_gone(
    ends: Ends, headers: tuple[tuple[bytes, bytes], ...], unsent: bytes
) -> None:
    """While it waits for the body, and while the call waits after that; never before the call."""

    async def wait(_: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await answer(400, send)

    caller = Caller(len(headers), goes_away=True)
    app = worker_app(ends, wait)
    ends.worker.send(Body(-1, unsent))
    async with asyncio.timeout(5):
        await app(scope(*headers), caller.receive, caller.send)
    assert [type(each) for each in ends.hub_heard] == [Body, Gone]
