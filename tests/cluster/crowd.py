"""Many real clients of a cluster, messages that flow to them, and who had to wait how long."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic, time
from typing import Self

import httpx

from pokebridge.client import PokeClient, ReceivedMessage
from pokebridge.client.events import Text
from tests.support import wait_until

TokenFor = Callable[[str, str], str]
"""Makes a token from a recipient and a scope."""


@dataclass
class Sent:
    """A message that was answered 202, asked for at ``asked_s``.

    It was committed, by the server's clock, which is this machine's, and pulled.
    """

    recipient: str
    asked_s: float
    committed_s: float = inf
    pulled_s: float = inf


class Client:
    """A recipient's one client, and where it has been."""

    def __init__(
        self, url: str, recipient: str, token: str, got: Callable[[ReceivedMessage], None]
    ) -> None:
        self.recipient = recipient
        self.instance = ""
        """The instance that it was last ready on."""
        self.ready_s: list[float] = []
        self._got = got
        self._client = PokeClient(url, token, self._on_messages, on_event=self._on_event)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._client.__aexit__(None, None, None)

    @property
    def connected(self) -> bool:
        """Whether it hears pokes."""
        return self._client.connected

    async def _on_messages(self, messages: Sequence[ReceivedMessage]) -> None:
        for message in messages:
            self._got(message)

    def _on_event(self, event: object) -> None:
        if isinstance(event, Text) and '"ready"' in event.text:
            self.instance = json.loads(event.text)["instance"]
            self.ready_s.append(monotonic())


@dataclass
class Act:
    """What was done to the cluster, and the silences meanwhile; in seconds."""

    name: str
    began_s: float
    struck: frozenset[str] = frozenset()
    """The recipients whose instance it was done to."""
    excused: tuple[float, float] = (inf, inf)
    """Between these times nobody could hear: the broker was down."""


@dataclass
class Crowd:
    """Clients at ``url``, one a recipient, and a sender. An async context manager."""

    url: str
    token_for: TokenFor
    count: int
    rate_per_s: float = 40.0
    sent: dict[str, Sent] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    refused: int = 0
    """Messages that were not taken; they are owed to nobody."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _sending: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connect everybody, and begin to send."""
        for number in range(self.count):
            recipient = f"urn:user:{number}"
            client = Client(self.url, recipient, self.token_for(recipient, ""), self._on_pulled)
            self.clients.append(await self._stack.enter_async_context(client))
            if number % 20 == 0:  # a ramp: what is tested is not the first minute of a cluster
                await wait_until(
                    lambda: sum(not client.connected for client in self.clients) < 50, 60
                )
        await wait_until(lambda: all(client.connected for client in self.clients), 60)
        self._sending = asyncio.create_task(self._send_steadily())
        return self

    async def __aexit__(self, *reason: object) -> None:
        """Stop sending, and disconnect everybody."""
        await self.stop_sending()
        await self._stack.aclose()

    async def stop_sending(self) -> None:
        """Send no more; what was answered is still to be pulled."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    def on(self, instance: str) -> frozenset[str]:
        """The recipients whose client is on ``instance``."""
        return frozenset(each.recipient for each in self.clients if each.instance == instance)

    @property
    def outstanding(self) -> int:
        """Messages that were answered 202 and are not pulled yet."""
        return sum(message.pulled_s == inf for message in self.sent.values())

    def longest_silence_s(self, act: Act, until_s: float, *, struck: bool) -> float:
        """How long a message had to wait at most, of those that were under way during ``act``.

        For the ``struck`` it counts from their client's last ``ready`` before the pull, if that is
        later: until then they were not connected. Time in which nobody could hear does not count.
        """
        ready_s = {client.recipient: client.ready_s for client in self.clients}
        longest_s = 0.0
        for message in self.sent.values():
            begun_s = message.committed_s
            if not begun_s < until_s or message.pulled_s < act.began_s:
                continue
            if (message.recipient in act.struck) != struck:
                continue
            if struck:
                again = [at_s for at_s in ready_s[message.recipient] if at_s < message.pulled_s]
                begun_s = max([begun_s, *again[-1:]])
            if act.excused[0] - 1 < begun_s < act.excused[1]:
                begun_s = act.excused[1]
            longest_s = max(longest_s, message.pulled_s - begun_s)
        return longest_s

    def _on_pulled(self, received: ReceivedMessage) -> None:
        message = self.sent.get(received.id)
        if message is not None and message.pulled_s == inf:
            message.pulled_s = monotonic()
            message.committed_s = message.pulled_s - (time() - received.sent_at.timestamp())

    async def _send_steadily(self) -> None:
        headers = {"Authorization": f"Bearer {self.token_for('urn:backend', 'send')}"}
        async with (
            httpx.AsyncClient(base_url=self.url, headers=headers, timeout=15) as http,
            asyncio.TaskGroup() as group,
        ):
            number = 0
            while True:
                number += 1
                group.create_task(self._send(http, f"m{number}"))
                await asyncio.sleep(random.uniform(0.5, 1.5) / self.rate_per_s)

    async def _send(self, http: httpx.AsyncClient, message_id: str) -> None:
        recipient = random.choice(self.clients).recipient
        body = {"recipient": recipient, "body": None, "id": message_id}
        # It may be pulled before it is answered; it counts when it is.
        message = self.sent[message_id] = Sent(recipient, monotonic())
        answered = False
        with suppress(httpx.HTTPError):
            answered = (await http.post("/v1/messages", json=body)).status_code == 202
        if not answered and message.pulled_s == inf:
            del self.sent[message_id]
            self.refused += 1
