"""The requests that a worker passes to its hub, over a real channel."""

import asyncio

import pytest

from pokebridge.api.pokes import POKES_CAP_BYTES
from pokebridge.asgi import Message, Receive, Scope, Send
from pokebridge.server.hub_http import PassedRequests
from pokebridge.server.worker import App, Worker
from pokebridge.settings import Settings
from pokebridge.tokens import TokenVerifier
from pokebridge.workers import methods
from tests.gateway.harness import SECRET
from tests.workers.ends import Ends

_PIECE = b"x" * 32 * 1024


@pytest.mark.parametrize("pieces", [1, 4, POKES_CAP_BYTES // len(_PIECE)])
async def test_a_body_arrives_whole_however_it_is_cut(ends: Ends, pieces: int) -> None:
    """The hub gets all of a body that any of its calls may accept."""
    passed, answered, left = [], [], pieces

    async def count_bytes(_: Scope, receive: Receive, send: Send) -> None:
        passed.append(len((await receive())["body"]))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def receive() -> Message:
        nonlocal left
        if not left:
            await asyncio.Event().wait()  # the client stays
        left -= 1
        return {"type": "http.request", "body": _PIECE, "more_body": left > 0}

    async def send(message: Message) -> None:
        answered.append(message.get("status"))

    ends.answers.offer(methods.HTTP, PassedRequests(count_bytes).answer)
    worker = Worker()
    worker.calls, worker.settings = ends.calls, Settings(dev=True)
    worker.verifier = TokenVerifier(secret=SECRET)
    path = "/v1/pokes/frames"
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [],
        "client": None,
        "server": None,
    }
    await App(worker, ())(scope, receive, send)
    assert (passed, answered) == ([pieces * len(_PIECE)], [204, None])
