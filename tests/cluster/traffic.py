"""Messages, the clients that pull them, and how long each had to wait."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from time import monotonic
from typing import Any

import httpx
import websockets
from websockets.asyncio.client import ClientConnection

from pokebridge.client import PokeClient, ReceivedMessage
from tests.cluster.clusters import NAMES, Cluster
from tests.support import Instance, wait_until

SEND_EVERY_S = 0.1


@asynccontextmanager
async def session(instance: Instance, recipient: str) -> AsyncIterator[ClientConnection]:
    """A bare session that is ready."""
    headers = instance.headers(recipient)
    async with websockets.connect(instance.ws_url, additional_headers=headers) as socket:
        assert json.loads(await socket.recv())["type"] == "ready"
        yield socket


async def next_frame(socket: ClientConnection) -> Any:
    """The next frame, but for the pokes of a gap: a stall of the machine may bring one any time."""
    while "within_ms" in (frame := json.loads(await socket.recv())):
        pass
    return frame


async def frames(socket: ClientConnection) -> list[Any]:
    """All frames that the instance has sent by now, but for the pokes of a gap.

    They are those that come before the answer to a ping.
    """
    await socket.send('{"type":"ping"}')
    heard: list[Any] = []
    while (frame := await next_frame(socket)) != {"type": "pong"}:
        heard.append(frame)
    return heard


@dataclass
class Traffic:
    """The messages that were answered 202, and who has pulled which; times are monotonic.

    Sent at ``sent_s`` means: asked for, so a silence is measured from before the commit.
    """

    sent_s: dict[str, float] = field(default_factory=dict)
    pulled_s: dict[tuple[str, str], float] = field(default_factory=dict)  # by device and message

    async def send(self, http: httpx.AsyncClient, recipient: str) -> None:
        """Send a message; it counts when it is answered."""
        asked_s = monotonic()
        answer = await http.post("/v1/messages", json={"recipient": recipient, "body": None})
        assert answer.status_code == 202, answer.text
        self.sent_s[f"{recipient} {answer.json()['version']}"] = asked_s

    @asynccontextmanager
    async def flowing(self, instance: Instance, recipients: Sequence[str]) -> AsyncIterator[None]:
        """Send to ``recipients`` in turn, all the time."""
        async with instance.async_http("urn:backend", "send") as http, asyncio.TaskGroup() as group:

            async def send_steadily() -> None:
                while True:
                    for recipient in recipients:
                        await self.send(http, recipient)
                        await asyncio.sleep(SEND_EVERY_S)

            sending = group.create_task(send_steadily())
            yield
            sending.cancel()

    async def more(self, count: int) -> None:
        """Return when ``count`` more messages are sent."""
        enough = len(self.sent_s) + count
        await wait_until(lambda: len(self.sent_s) >= enough, what=f"{count} more messages")

    def client(
        self, instance: Instance, recipient: str, device: str, cursor: int = 0
    ) -> PokeClient:
        """A client that notes what it pulls."""

        async def note(messages: Sequence[ReceivedMessage]) -> None:
            for message in messages:
                self.pulled_s.setdefault((device, f"{recipient} {message.version}"), monotonic())

        token = instance.token(recipient)
        return PokeClient(instance.url, token, note, device=device, cursor=cursor)

    def missing(self, devices: Sequence[str] = NAMES) -> set[tuple[str, str]]:
        """What not all of ``devices`` have pulled yet."""
        return {(device, sent) for device in devices for sent in self.sent_s} - set(self.pulled_s)

    async def all_pulled(self, devices: Sequence[str] = NAMES, timeout_s: float = 60.0) -> None:
        """Return when every device has pulled all that was sent."""
        await wait_until(lambda: not self.missing(devices), timeout_s, "everything being pulled")

    def silence_s(self, from_s: float, to_s: float = inf) -> float:
        """How long after ``from_s``, or after it was sent if that is later, a client got a message.

        The longest such time, of all the messages that were sent before ``to_s``.
        """
        return max(
            pulled_s - max(from_s, self.sent_s[message])
            for (_, message), pulled_s in self.pulled_s.items()
            if self.sent_s.get(message, inf) < to_s  # not the one whose answer was cut off
        )


@asynccontextmanager
async def clients(
    cluster: Cluster, traffic: Traffic, recipients: Sequence[str]
) -> AsyncIterator[dict[tuple[str, str], PokeClient]]:
    """A ready client of each recipient on each instance, by recipient and instance.

    The devices, named after the instances, are made known first, lest the acks of those that have
    come already delete a message before the others have.
    """
    async with AsyncExitStack() as stack:
        entered: dict[tuple[str, str], PokeClient] = {}
        for recipient in recipients:
            async with cluster.instances[0].async_http(recipient) as http:
                for name in NAMES:
                    answer = await http.get("/v1/messages", params={"device": name})
                    assert answer.is_success
            for name, instance in zip(NAMES, cluster.instances, strict=True):
                client = traffic.client(instance, recipient, name)
                entered[recipient, name] = await stack.enter_async_context(client)
        for client in entered.values():
            await client.wait_ready(60)
        yield entered
