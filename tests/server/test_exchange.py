"""The ASGI side of a connection does for any application what uvicorn's does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
import uvicorn
from uvicorn.server import ServerState

from pokebridge.asgi import ASGIApp, Message, Receive, Scope, Send
from pokebridge.border import unforeseen
from pokebridge.server.exchange import ExchangeProtocol
from tests.support import wait_until

TIMEOUT_S = 20.0
GET = b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[Callable[..., Coroutine[None, None, bytes]]]:
    """Serve ``app``. Gives a function that sends pieces and returns all that is answered."""
    config = uvicorn.Config(app, http=ExchangeProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: ExchangeProtocol(config, state, {}), "127.0.0.1", port=0
    )

    async def ask(*pieces: bytes, until: bytes = b"") -> bytes:
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port)
        answer = b""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                for sent in pieces:
                    writer.write(sent)
                    if until and sent is not pieces[-1]:
                        answer += await reader.readuntil(until)
                return answer + await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()

    try:
        yield ask
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.gather(*state.tasks)


def answering(*messages: Message) -> ASGIApp:
    """An application that sends ``messages``."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


def start(status: int, **headers: str) -> Message:
    """The first message of a response."""
    listed = [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": listed}


def piece(body: bytes, *, more: bool = False) -> Message:
    """A piece of a response's body."""
    return {"type": "http.response.body", "body": body, "more_body": more}


async def test_the_scope_is_that_of_the_request() -> None:
    """Path, query and headers, as ASGI has them."""
    scopes: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await send(start(200, content_length="2"))
        await send(piece(b"ok"))

    async with serving(app) as ask:
        answer = await ask(GET + LAST)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    first = scopes[0]
    assert (first["method"], first["path"], first["raw_path"]) == ("GET", "/a b", b"/a%20b")
    assert (first["query_string"], first["headers"]) == (b"c=d", [(b"host", b"x")])
    assert [scope["path"] for scope in scopes] == ["/a b", "/last"]


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Although the first takes longest."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        for _ in range(0 if scope["path"] == "/last" else 5):
            await asyncio.sleep(0)
        path: bytes = scope["raw_path"]
        await send(start(200, content_length=str(len(path))))
        await send(piece(path))

    async with serving(app) as ask:
        answer = await ask(GET + GET + LAST)
    bodies = [each.partition(b"\r\n\r\n")[2] for each in answer.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [b"/a%20b", b"/a%20b", b"/last"]


async def test_a_body_arrives_in_pieces() -> None:
    """The application receives what there is, waits for the rest, and hears that it was all."""
    received: list[Message] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        while not received or received[-1]["more_body"]:
            received.append(await receive())
        await send(start(204))
        await send(piece(b""))
        received.append(await receive())

    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    async with serving(app) as ask:
        answer = await ask(
            head + b"Content-Length: 200000\r\n\r\n", b"x" * 200_000, until=b"\r\n\r\n"
        )
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n")
    assert received[-1] == {"type": "http.disconnect"}
    assert sum(len(message["body"]) for message in received[:-1]) == 200_000


async def test_a_caller_that_vanishes_is_noticed() -> None:
    """It disconnects in the middle of its body, and later sends are dropped."""
    last: list[Message] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        while not last or last[-1]["type"] != "http.disconnect":
            last.append(await receive())
        await send(start(400, content_length="0"))
        await send(piece(b""))

    async with serving(app) as ask:
        asking = asyncio.create_task(ask(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n12"))
        await wait_until(lambda: bool(last))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await wait_until(lambda: last[-1]["type"] == "http.disconnect")


@pytest.mark.parametrize(
    ("messages", "request_", "expected"),
    [
        (
            [start(200), piece(b"ab", more=True), piece(b"c")],
            LAST,
            b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
        ),
        ([start(200, content_length="3"), piece(b"ab", more=True), piece(b"c")], LAST, b"abc"),
        ([start(200, content_length="3"), piece(b"abc")], LAST.replace(b"GET", b"HEAD"), b""),
        ([start(304), piece(b"")], LAST, b""),
        ([start(200, content_length="1", connection="close"), piece(b"a")], GET, b"a"),
    ],
    ids=["chunks", "pieces", "head", "no content", "close"],
)
async def test_bodies(messages: list[Message], request_: bytes, expected: bytes) -> None:
    """A body goes in one piece or several, in chunks when its length is unknown, or not at all."""
    async with serving(answering(*messages)) as ask:
        head, _, body = (await ask(request_)).partition(b"\r\n\r\n")
    assert body == expected
    assert (b"transfer-encoding: chunked" in head) == expected.endswith(b"0\r\n\r\n")
    assert head.count(b"connection: close") == 1


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [piece(b"")],
        [start(200, x="a\r\nset-cookie: b"), piece(b"")],
        [start(200, x="a\nb"), piece(b"")],
        [start(200, x="a\rb"), piece(b"")],
    ],
    ids=["nothing", "a body first", "a line end", "a line feed", "a carriage return"],
)
async def test_a_wrong_application_is_a_500(messages: list[Message]) -> None:
    """Nothing of its answer gets out."""
    before = unforeseen["api"]
    async with serving(answering(*messages)) as ask:
        answer = await ask(GET)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"application/problem+json" in answer
    assert b"set-cookie" not in answer
    assert unforeseen["api"] - before == bool(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [start(200, content_length="3"), piece(b"ab", more=True), piece(b"")],
        [start(200, content_length="3"), piece(b"ab", more=True), piece(b"cd")],
        [start(200, content_length="3"), piece(b"ab", more=True)],
        [start(200, content_length="3"), piece(b"ab", more=True), start(200)],
    ],
    ids=["too short", "too long", "never ended", "begun again"],
)
async def test_an_answer_that_goes_wrong_is_cut_off(messages: list[Message]) -> None:
    """The client sees that it has not the whole, for there is less than the head says."""
    async with serving(answering(*messages)) as ask:
        assert (await ask(GET)).endswith(b"\r\n\r\nab")
