"""Many real clients of a cluster, messages that flow to them, and who had to wait how long."""

import asyncio
import json
import random
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic, time
from typing import Self
from urllib.parse import urlsplit

import httpx

from pokebridge.bench.clients import Observer, PulledMessage, StormClient
from pokebridge.bench.fleet import Balancer, Endpoint
from pokebridge.bench.http_pool import HttpPool
from pokebridge.client.events import AnyEvent, Text
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


class Client(StormClient):
    """A recipient's one client, and where it has been.

    It keeps the smart client's rules and costs little, so that two thousand of them measure the
    cluster and not themselves, on the same machine.
    """

    def __init__(self, balancer: Balancer, observer: Observer, recipient: str, token: str) -> None:
        super().__init__(balancer, observer, recipient, token)
        self.instance = ""
        """The instance that it was last ready on."""
        self.ready_s: list[float] = []

    def _feed(self, event: AnyEvent) -> None:
        """Note where it is ready."""
        if isinstance(event, Text) and '"ready"' in event.text:
            self.instance = json.loads(event.text)["instance"]
            self.ready_s.append(monotonic())
        super()._feed(event)


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
class Crowd(Observer):
    """Clients at ``url``, one a recipient, and a sender. An async context manager."""

    url: str
    token_for: TokenFor
    count: int
    rate_per_s: float = 40.0
    sent: dict[str, Sent] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    refused: int = 0
    """Messages that were not taken; they are owed to nobody."""
    _sending: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        """Let each client pull through a connection of its own, as from its own machine."""
        self._endpoint = Endpoint("balancer", urlsplit(self.url).port or 0)
        self._endpoint.http = HttpPool(self._endpoint.port, self.count)

    async def __aenter__(self) -> Self:
        """Connect everybody, and begin to send."""
        balancer = Balancer([self._endpoint])
        for number in range(self.count):
            recipient = f"urn:user:{number}"
            client = Client(balancer, self, recipient, self.token_for(recipient, ""))
            self.clients.append(client)
            client.start()
            if number % 20 == 0:  # a ramp: what is tested is not the first minute of a cluster
                await wait_until(lambda: sum(not client.ready for client in self.clients) < 50, 60)
        await wait_until(lambda: all(client.ready for client in self.clients), 60)
        self._sending = asyncio.create_task(self._send_steadily())
        return self

    async def __aexit__(self, *reason: object) -> None:
        """Stop sending, and disconnect everybody."""
        await self.stop_sending()
        for client in self.clients:
            client.stop()
        self._endpoint.http.close()

    async def stop_sending(self) -> None:
        """Send no more; what was answered is still to be pulled."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)

    def on(self, instance: str) -> frozenset[str]:
        """The recipients whose client is on ``instance``."""
        return frozenset(each.recipient for each in self.clients if each.instance == instance)

    @property
    def pulled(self) -> list[Sent]:
        """Messages that were pulled."""
        return [message for message in self.sent.values() if message.pulled_s < inf]

    def forget_lost(self, since_s: float, until_s: float, kept: Collection[str]) -> int:
        """The mailbox lost what it was sent meanwhile, but ``kept`` some; returns how many."""
        lost = [
            message_id
            for message_id, message in self.sent.items()
            if since_s < message.asked_s < until_s
            and message.pulled_s == inf
            and message_id not in kept
        ]
        for message_id in lost:
            del self.sent[message_id]
        return len(lost)

    @property
    def outstanding(self) -> int:
        """Messages that were answered 202 and are not pulled yet."""
        return sum(message.pulled_s == inf for message in self.sent.values())

    def longest_silence_s(self, act: Act, until_s: float, *, struck: bool) -> float:
        """How long a message had to wait at most, of those that were under way during ``act``.

        It counts from the client's last ``ready`` before the pull, if that is later: until then it
        was not connected. For those that were not ``struck`` only a ``ready`` before the act does,
        since an earlier act has struck them. Time in which nobody could hear does not count.
        """
        ready_s = {client.recipient: client.ready_s for client in self.clients}
        longest_s = 0.0
        for message in self.sent.values():
            begun_s = message.committed_s
            if not begun_s < until_s or message.pulled_s < act.began_s:
                continue
            if (message.recipient in act.struck) != struck:
                continue
            ends_s = message.pulled_s if struck else act.began_s
            again = [at_s for at_s in ready_s[message.recipient] if at_s < ends_s]
            begun_s = max([begun_s, *again[-1:]])
            if act.excused[0] - 1 < begun_s < act.excused[1]:
                begun_s = act.excused[1]
            longest_s = max(longest_s, message.pulled_s - begun_s)
        return longest_s

    def on_pull(self, client: StormClient, messages: list[PulledMessage]) -> None:
        """Note what was pulled, and how long ago it was committed."""
        for pulled in messages:
            message = self.sent.get(pulled.id)
            if message is not None and message.pulled_s == inf:
                message.pulled_s = monotonic()
                message.committed_s = message.pulled_s - (time() - pulled.sent_at.timestamp())

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
        # A message may be pulled before its send is answered. It counts once it is answered.
        message = self.sent[message_id] = Sent(recipient, monotonic())
        answered = False
        try:
            with suppress(httpx.HTTPError):
                answered = (await http.post("/v1/messages", json=body)).status_code == 202
        finally:  # also if the sending ends meanwhile
            if not answered and message.pulled_s == inf:
                del self.sent[message_id]
                self.refused += 1
