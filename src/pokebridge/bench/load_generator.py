"""The load generator behind ``pokebridge bench``.

Each client has one session and a recipient of its own. A recipient is poked only while none of
its pokes is under way. So every poke sent must arrive as one frame, merging hides nothing, and
what has not arrived at the end is lost.
"""

import asyncio
import json
import secrets
import ssl
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from pokebridge.api_client import ApiClient
from pokebridge.errors import PokebridgeError
from pokebridge.http_publisher import MAX_RECIPIENTS_PER_REQUEST, chunks
from pokebridge.supervisor import cancel
from pokebridge.wire import CONNECT_PATH

HANDSHAKE_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 1.0
# The interval between batches of pokes, and how long the last pokes have to arrive.
TICK_S = 0.01
STRAGGLERS_S = 5.0
MAX_REQUESTS = 64
# Nobody reads the mailboxes after the benchmark.
MESSAGE_TTL_S = 60.0
# How much longer a token lives than the run.
TOKEN_SPARE_S = 300.0

_EXPECTED = (OSError, WebSocketException, PokebridgeError)
# Raised by a frame that docs/protocol.md does not define.
_NOT_OURS = (ValueError, LookupError, TypeError)


@dataclass(frozen=True, slots=True)
class Plan:
    """``clients`` connect within ``ramp_s``; then ``duration_s`` of ``rate_per_s`` pokes.

    With ``messages`` each poke is caused by a message that is sent through the API.
    """

    clients: int
    ramp_s: float
    duration_s: float
    rate_per_s: float
    messages: bool


@dataclass(slots=True)
class Tally:
    """What was measured so far; times in seconds."""

    handshakes_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    present: int = 0
    """Clients with a session at the end of the run."""
    sent: int = 0
    sending_s: float = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Failed handshakes and requests, and sessions that ended, by reason."""

    @property
    def lost(self) -> int:
        """Pokes that were accepted and have not arrived (yet)."""
        return self.sent - len(self.latencies_s)


class _Client:
    """One recipient; ``poked_at`` while a poke is under way to it."""

    def __init__(self, recipient: str) -> None:
        self.recipient = recipient
        self.connected = False
        self.poked_at: float | None = None


class LoadGenerator:
    """Carries out a :class:`Plan` against the instance of ``api``; results are in ``tally``."""

    def __init__(self, api: ApiClient, plan: Plan) -> None:
        self.tally = Tally()
        self._api = api
        self._plan = plan
        run = secrets.token_hex(4)
        self._subject = f"urn:bench:{run}"
        self._clients = [_Client(f"{self._subject}:{n}") for n in range(plan.clients)]
        self._idle: deque[_Client] = deque()
        self._settled = asyncio.Event()
        self._unsettled = plan.clients
        self._ws_url = "ws" + api.url.removeprefix("http") + CONNECT_PATH
        # Shared: creating one reads all certificate authorities of the machine.
        self._tls = ssl.create_default_context() if api.url.startswith("https:") else None
        self._ttl_s = plan.ramp_s + plan.duration_s + TOKEN_SPARE_S

    @property
    def connected(self) -> int:
        """How many sessions are ready now."""
        return sum(client.connected for client in self._clients)

    async def run(self) -> None:
        """Connect, send, wait for the last pokes, disconnect.

        Raises:
            PokebridgeError: no token is available to send with.
        """
        scope = "send" if self._plan.messages else "poke"
        token = await self._api.token_for(self._subject, [scope], self._ttl_s)
        sessions = [
            asyncio.create_task(self._session(client, self._plan.ramp_s * n / self._plan.clients))
            for n, client in enumerate(self._clients)
        ]
        try:
            await self._settled.wait()
            if self._idle:
                await self._send_at_rate(token)
                await self._stragglers()
            self.tally.present = self.connected
        finally:
            await cancel(*sessions)

    # --- clients ---

    async def _session(self, client: _Client, delay_s: float) -> None:
        settled = False

        def settle() -> None:
            nonlocal settled
            if not settled:
                settled = True
                self._unsettled -= 1
                if not self._unsettled:
                    self._settled.set()

        try:
            await asyncio.sleep(delay_s)
            await self._listen(client, settle)
        except (*_EXPECTED, *_NOT_OURS) as error:
            self.tally.failures[_reason(error)] += 1
        finally:
            client.connected = False
            settle()

    async def _listen(self, client: _Client, on_ready: Callable[[], None]) -> None:
        token = await self._api.token_for(client.recipient, [], self._ttl_s)
        started_at = perf_counter()
        url = self._ws_url
        while True:
            async with self._connect(url, token) as socket:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    frame = await _frame(socket, "ready", "move")
                if frame["type"] == "move":
                    url = _moved(frame)
                    continue
                if not client.connected:
                    self.tally.handshakes_s.append(perf_counter() - started_at)
                    client.connected = True
                    self._idle.append(client)
                    on_ready()
                elif client.poked_at is not None:
                    self._take_back([client])  # its poke may have come between the two sessions
                try:
                    url = await self._hear(client, socket)
                except asyncio.CancelledError:
                    await socket.close()  # with 1000: the context manager would close with 1011
                    raise

    def _connect(self, url: str, token: str) -> connect:
        return connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            open_timeout=HANDSHAKE_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,
            ssl=self._tls if url.startswith("wss:") else None,
        )

    async def _hear(self, client: _Client, socket: ClientConnection) -> str:
        """Count pokes until the server moves the session. Return the URL to go to."""
        while True:
            frame = await _frame(socket, "poke", "move")
            if frame["type"] == "move":
                return _moved(frame)
            if client.poked_at is not None:
                self.tally.latencies_s.append(perf_counter() - client.poked_at)
                client.poked_at = None
                self._idle.append(client)

    # --- sending ---

    async def _send_at_rate(self, token: str) -> None:
        started_at = perf_counter()
        due = 0
        requests: set[asyncio.Task[None]] = set()
        while (elapsed_s := perf_counter() - started_at) < self._plan.duration_s:
            target = int(elapsed_s * self._plan.rate_per_s)
            clients = self._take_idle(target - due)
            due += len(clients)
            size = 1 if self._plan.messages else MAX_RECIPIENTS_PER_REQUEST
            for some in chunks(clients, size):
                while len(requests) >= MAX_REQUESTS:
                    await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
                request = asyncio.create_task(self._send(token, some))
                requests.add(request)
                request.add_done_callback(requests.discard)
            await asyncio.sleep(TICK_S)
        self.tally.sending_s = perf_counter() - started_at
        if requests:
            await asyncio.wait(requests)

    def _take_idle(self, at_most: int) -> Sequence[_Client]:
        """The clients that were idle longest; those without a session are dropped."""
        taken: list[_Client] = []
        while self._idle and len(taken) < at_most:
            client = self._idle.popleft()
            if client.connected:
                taken.append(client)
        return taken

    async def _send(self, token: str, clients: Sequence[_Client]) -> None:
        recipients = [client.recipient for client in clients]
        now = perf_counter()
        for client in clients:
            client.poked_at = now
        self.tally.sent += len(clients)
        try:
            if self._plan.messages:
                message = {"recipient": recipients[0], "body": None, "ttl_s": MESSAGE_TTL_S}
                await self._api.post("/v1/messages", token, message)
            else:
                await self._api.post("/v1/pokes", token, {"recipients": recipients})
        except PokebridgeError as error:
            self.tally.failures[_reason(error)] += 1
            self._take_back(clients)

    def _take_back(self, clients: Sequence[_Client]) -> None:
        """Expect no pokes after a refused request; those that came all the same count."""
        for client in clients:
            if client.poked_at is not None:
                client.poked_at = None
                self.tally.sent -= 1
                self._idle.append(client)

    async def _stragglers(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(STRAGGLERS_S):
                while self.tally.lost:  # noqa: ASYNC110 - each poke would have to set an event
                    await asyncio.sleep(TICK_S)


async def _frame(socket: ClientConnection, *wanted: str) -> dict[str, Any]:
    """Wait for a frame of a ``wanted`` type, and ignore others."""
    while True:
        frame: dict[str, Any] = json.loads(await socket.recv())
        if frame["type"] in wanted:
            return frame


def _moved(frame: dict[str, Any]) -> str:
    """The URL of a client that follows a ``move`` frame."""
    return f"{frame['url']}?moved=1"


def _reason(error: Exception) -> str:
    match error:
        case InvalidStatus():
            return f"the handshake was answered {error.response.status_code}"
        case ConnectionClosed():
            code = error.rcvd.code if error.rcvd else 1006
            return f"a session was closed with {code}"
        case TimeoutError():
            return f"no answer within {HANDSHAKE_TIMEOUT_S:g} s"
        case OSError():
            return error.strerror or type(error).__name__
        case PokebridgeError():
            return str(error)
        case _:
            return "the server does not speak pokebridge's protocol"
