"""A real instance with one of the mailboxes, and the calls that a message makes, for ``cycle``."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.callers import Answer, HttpConnection, Socket, request
from benchmarks.carriers import CALLERS, Carrier, Cost, Measured
from benchmarks.harness import SECRET, BenchmarkError, Server, instance, quiet, recipient
from benchmarks.mailbox import BODY
from pokebridge.tokens import sign_token
from tests.support.engines import run_configured_nats, run_postgres


@contextlib.asynccontextmanager
async def open_instance(
    mailbox: str, clients: int, requests: int, messages: int, **more: str
) -> AsyncIterator["Instance"]:
    """An instance with this kind of mailbox, ``clients`` that listen, and CALLERS that do not.

    ``more`` are further settings.
    """
    async with contextlib.AsyncExitStack() as opened:
        settings, engines = opened.enter_context(_settings(mailbox))
        server = await opened.enter_async_context(instance(**settings, **more))

        def http() -> HttpConnection:
            connection = HttpConnection(server.port)
            opened.callback(connection.close)
            return connection

        senders: asyncio.LifoQueue[HttpConnection] = asyncio.LifoQueue()
        callers = [
            _Caller(recipient(clients + n), recipient(n % clients), http()) for n in range(CALLERS)
        ]
        receivers = []
        for number in range(clients):
            name = recipient(number)
            token = sign_token(SECRET, name)
            socket = await Socket(server.port).shake_hands(token)
            opened.callback(socket.close)
            receivers.append(_Receiver(name, http(), socket, senders))
        for _ in range(CALLERS):
            senders.put_nowait(http())
        yield Instance(mailbox, server, engines, receivers, callers, requests, messages)


@contextlib.contextmanager
def _settings(mailbox: str) -> Iterator[tuple[dict[str, str], list[Server]]]:
    """The settings for this mailbox, and the engines that it needs."""
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        if mailbox == "memory":
            yield {"mailbox": "memory://"}, []
        elif mailbox == "SQLite":
            yield {"mailbox": f"sqlite:///{Path(folder) / 'mailbox.db'}"}, []
        else:
            database = opened.enter_context(run_postgres())
            # Instances that share a mailbox need a transport that they share.
            nats = opened.enter_context(run_configured_nats(Path(folder), ""))
            engines = [Server(it.port, psutil.Process(it.pid)) for it in (database, nats)]
            yield {"mailbox": database.url, "transport": nats.url}, engines


class _Caller:
    """A client without a socket, on a connection that is kept alive.

    - ``listener``: a client with a socket, which it pokes
    - ``head``: the version of its own newest message
    - ``token``: its token, which may send and poke as well
    """

    def __init__(self, name: str, listener: str, http: HttpConnection) -> None:
        self.name = name
        self.listener = listener
        self.head = 0
        self.token = sign_token(SECRET, name, ["send", "poke"])
        self._http = http

    def send(self) -> bytes:
        """The request that sends a message to itself."""
        return _send(self.token, self.name)

    def poke(self) -> bytes:
        """The request that pokes the listener."""
        return request("POST", "/v1/pokes", self.token, {"recipient": self.listener})

    def pull(self, after: int, headers: str = "") -> bytes:
        """The request for one message."""
        return _pull(self.token, after, headers)

    async def call(self, status: int, questions: Sequence[bytes]) -> Answer:
        """Make calls one after the other. Returns the last answer."""
        for question in questions:
            answer = await self._http.expect(status, question)
        return answer


class _Receiver:
    """A client with a socket, which pulls when it hears a poke, and acknowledges.

    - ``version``: up to which it has everything
    - ``acks_over_socket``: whether the instance offers that
    """

    def __init__(
        self,
        name: str,
        http: HttpConnection,
        socket: Socket,
        senders: "asyncio.LifoQueue[HttpConnection]",
    ) -> None:
        self.version = 0
        self.acks_over_socket = socket.ready.get("acks") is True
        self._http = http
        self._socket = socket
        self._senders = senders
        self._token = sign_token(SECRET, name)
        self._message = _send(sign_token(SECRET, "urn:service:bench", ["send"]), name)
        self._heard: asyncio.Future[float] | None = None
        self._turn = asyncio.Lock()
        socket.on_text = self._on_text

    async def cycle(self) -> float:
        """See the protocol."""
        sent_s = time.perf_counter()
        async with self._turn:
            self._heard = asyncio.get_running_loop().create_future()
            await self.send()
            heard_s = await self._heard
            answer = await self._http.expect(200, _pull(self._token, self.version))
            page = msgspec.json.decode(answer.body)
            if len(page["messages"]) != 1:
                raise BenchmarkError(f"a client pulled {page} after one message was sent")
            await self.ack(page["version"])
        return heard_s - sent_s

    async def send(self) -> int:
        """Send it a message. Returns the version."""
        sender = await self._senders.get()
        answer = await sender.expect(202, self._message)
        self._senders.put_nowait(sender)
        version: int = msgspec.json.decode(answer.body)["version"]
        return version

    async def ack(self, version: int) -> None:
        """Acknowledge everything up to ``version``, over the socket if that is possible."""
        self.version = version
        if self.acks_over_socket:
            self._socket.send_text(b'{"type":"ack","version":%d}' % version)
        else:
            await self._http.expect(204, _ack(self._token, version))

    async def ping(self) -> None:
        """Return when the instance has read what the socket has sent."""
        await self._socket.ping()

    def _on_text(self, text: bytes) -> None:
        frame: dict[str, Any] = msgspec.json.decode(text)
        is_news = frame.get("type") == "poke" and frame.get("version", 0) > self.version
        if is_news and self._heard is not None and not self._heard.done():
            self._heard.set_result(time.perf_counter())


class Instance(Carrier):
    """An instance: each call alone, and the whole message."""

    def __init__(
        self,
        mailbox: str,
        server: Server,
        engines: Sequence[Server],
        receivers: Sequence[_Receiver],
        callers: Sequence[_Caller],
        requests: int,
        messages: int,
    ) -> None:
        super().__init__(mailbox, server, receivers, messages, engines)
        self._clients = receivers
        self._callers = callers
        self._each = requests // len(callers)

    def parts(self) -> dict[str, Measured]:
        """Calls, in an order in which each finds what it needs; then the whole message."""
        calls: dict[str, Measured] = {
            "send": self._send,
            "poke": self._poke,
            "pull of a message": self._pull,
            "pull without news": self._pull_in_vain,
            "pull, 304": self._pull_unchanged,
            "ack over HTTP": self._ack,
        }
        if all(client.acks_over_socket for client in self._clients):
            calls["ack over the socket"] = self._ack_over_socket
        return {f"{name}, {self.name}": call for name, call in calls.items()} | super().parts()

    async def _send(self) -> Cost:
        async def work() -> int:
            answers = await self._all(202, lambda caller: [caller.send()] * self._each)
            for caller, answer in zip(self._callers, answers, strict=True):
                caller.head = msgspec.json.decode(answer.body)["version"]
            return self._count

        return await self.cost(work)

    async def _poke(self) -> Cost:
        return await self._cost_of(202, lambda it: [it.poke()] * self._each)

    async def _pull(self) -> Cost:
        return await self._cost_of(
            200, lambda it: [it.pull(it.head - n) for n in range(self._each, 0, -1)]
        )

    async def _pull_in_vain(self) -> Cost:
        return await self._cost_of(200, lambda it: [it.pull(it.head)] * self._each)

    async def _pull_unchanged(self) -> Cost:
        tags = {
            caller.name: (await caller.call(200, [caller.pull(caller.head)])).etag
            for caller in self._callers
        }
        return await self._cost_of(
            304, lambda it: [it.pull(it.head, f"If-None-Match: {tags[it.name]}\r\n")] * self._each
        )

    async def _ack(self) -> Cost:
        return await self._cost_of(
            204, lambda it: [_ack(it.token, it.head - n) for n in range(self._each - 1, -1, -1)]
        )

    async def _ack_over_socket(self) -> Cost:
        """Every client acknowledges once; then so again. The instance has read them in between."""
        sweeps = max(1, self._count // len(self._clients))
        for _ in range(sweeps):
            heads = await asyncio.gather(*(client.send() for client in self._clients))
        await quiet(self.server)

        async def work() -> int:
            for left in range(sweeps - 1, -1, -1):
                for client, head in zip(self._clients, heads, strict=True):
                    await client.ack(head - left)
                await self._clients[-1].ping()
            return sweeps * len(self._clients)

        return await self.cost(work)

    @property
    def _count(self) -> int:
        return self._each * len(self._callers)

    async def _cost_of(self, status: int, questions: Callable[[_Caller], list[bytes]]) -> Cost:
        async def work() -> int:
            await self._all(status, questions)
            return self._count

        return await self.cost(work)

    async def _all(
        self, status: int, questions: Callable[[_Caller], list[bytes]]
    ) -> Sequence[Answer]:
        calls = (caller.call(status, questions(caller)) for caller in self._callers)
        return await asyncio.gather(*calls)


def _send(token: str, name: str) -> bytes:
    body = {"recipient": name, "body": msgspec.Raw(BODY)}
    return request("POST", "/v1/messages", token, body)


def _pull(token: str, after: int, headers: str = "") -> bytes:
    return request("GET", f"/v1/messages?after={after}&limit=1", token, headers=headers)


def _ack(token: str, version: int) -> bytes:
    return request("POST", "/v1/messages/ack", token, {"version": version})
