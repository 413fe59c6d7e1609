"""The load generator against a running instance, and what it says when pokes do not come."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from pokebridge.asgi import Receive, Scope, Send
from pokebridge.bench import load_generator
from pokebridge.wire import PROBLEM_TYPE
from tests.cli.conftest import Result, Run
from tests.support.serving import JWT_SECRET

Bench = Callable[[], Awaitable[Result]]

FEW = ("--clients", "20", "--ramp-s", "0.1", "--duration-s", "1")


@pytest.mark.parametrize(
    ("flag", "kind"), [("--pokes-per-s", "pokes"), ("--messages-per-s", "messages")]
)
def test_a_healthy_instance_loses_nothing(ask: Run, flag: str, kind: str) -> None:
    """All connect, each poke that was sent is heard, and both are timed."""
    result = ask("bench", *FEW, flag, "50", "--json")
    report: dict[str, Any] = json.loads(result.out)
    assert result.status == 0
    assert (report["clients"], report["connected"], report["kind"]) == (20, 20, kind)
    assert 0 < report["sent"] <= 50
    assert report["sent"] == report["heard"]
    assert (report["lost"], report["failures"]) == (0, {})
    for times in (report["handshake_ms"], report["latency_ms"]):
        assert 0 < times["p50"] <= times["p99"] <= times["max"] < 10_000


def test_the_table_says_the_same(ask: Run) -> None:
    """For people; progress is on stderr."""
    result = ask("bench", *FEW)
    assert "20 of 20 connected" in result.out
    assert "0 lost" in result.out
    assert "20 connected" in result.err


def test_no_session_at_all_is_a_failure(ask: Run) -> None:
    """The reason is said once, not for each client."""
    result = ask("bench", *FEW, POKEBRIDGE_JWT_SECRET="x" * 32)
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1] == (
        "pokebridge: no client could connect: the handshake was answered 401"
    )


class Faulty:
    """An instance that takes everything and pokes nobody; what it says can be changed."""

    def __init__(self) -> None:
        self.frame = '{"type": "ready"}'
        self.close_code: int | None = None
        self.status = 202
        self.url = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "http":
            await self._answer(receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": self.frame})
        if self.close_code is not None:
            await send({"type": "websocket.close", "code": self.close_code})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async def _answer(self, receive: Receive, send: Send) -> None:
        """Answer ``POST /v1/pokes`` as the bridge does: accept, or refuse with a problem."""
        body, more = b"", True
        while more:
            part = await receive()
            body, more = body + part.get("body", b""), part.get("more_body", False)
        if self.status == 202:
            media_type = "application/json"
            answer: dict[str, Any] = {"accepted": len(json.loads(body)["recipients"])}
        else:
            media_type = PROBLEM_TYPE
            answer = {"type": "about:blank", "title": "Refused", "status": self.status}
            answer["detail"] = "so it is"
        headers = [(b"content-type", media_type.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@pytest.fixture
async def faulty() -> AsyncIterator[Faulty]:
    """A faulty instance that listens."""
    app = Faulty()
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="websockets-sansio")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield app
        server.should_exit = True
        await serving


@pytest.fixture
def bench(faulty: Faulty, run: Run, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The command against the faulty instance, impatient, in a thread of its own."""
    monkeypatch.setattr(load_generator, "STRAGGLERS_S", 0.1)
    args = ("bench", *FEW, "--json", "--url", faulty.url)
    return lambda: asyncio.to_thread(run, *args, POKEBRIDGE_JWT_SECRET=JWT_SECRET)


async def test_pokes_that_do_not_come_are_lost(bench: Bench) -> None:
    """Each that was accepted was expected."""
    report = json.loads((await bench()).out)
    assert report["sent"] > 0
    assert (report["heard"], report["lost"]) == (0, report["sent"])
    assert report["latency_ms"] is None


async def test_requests_that_fail_are_told_from_lost_pokes(faulty: Faulty, bench: Bench) -> None:
    """A poke that was not accepted is not expected to arrive."""
    faulty.status = 503
    report = json.loads((await bench()).out)
    assert (report["sent"], report["lost"]) == (0, 0)
    ((reason, count),) = report["failures"].items()
    assert reason.endswith("answered 503: so it is")
    assert count > 0


async def test_sessions_that_end_are_counted(faulty: Faulty, bench: Bench) -> None:
    """They are counted by close code, and nothing more is sent to them."""
    faulty.close_code = 1012
    report = json.loads((await bench()).out)
    assert report["connected"] == 20
    assert report["failures"] == {"a session was closed with 1012": 20}
    # The last client may get `ready` just before it ends. The others ended while it connected.
    assert report["sent"] < 10


async def test_a_server_of_another_kind_is_a_failure(faulty: Faulty, bench: Bench) -> None:
    """A WebSocket server of another program is reported in one line."""
    faulty.frame = "hello"
    result = await bench()
    assert (result.status, result.out) == (1, "")
    assert "does not speak pokebridge's protocol" in result.err
