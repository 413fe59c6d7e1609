"""Clients that are there, and messages for them at a steady rate."""

import asyncio
import json
import random
import secrets
from collections.abc import Iterable, Sequence
from time import monotonic

from pokebridge.bench.storm_clients import StormClient
from pokebridge.bench.storm_fleet import Balancer
from pokebridge.bench.storm_http import HOST, Answer
from pokebridge.bench.storm_watch import Message, Watcher
from pokebridge.tokens import sign_token

_SEND_EVERY_S = 0.01
_RESEND_S = 0.2
_TOKEN_TTL_S = 6 * 3600.0
_MESSAGE_TTL_S = 600
# How often to look for a client that waits for no message, before one is left out.
_DRAWS = 20


def make_clients(
    count: int, secret: str, balancer: Balancer, watcher: Watcher
) -> Sequence[StormClient]:
    """So many clients, each a recipient of its own; they are not started."""
    run = secrets.token_hex(4)
    recipients = [f"urn:storm:{run}:{number}" for number in range(count)]
    return [
        StormClient(balancer, watcher, each, sign_token(secret, each, (), _TOKEN_TTL_S))
        for each in recipients
    ]


async def start_clients(clients: Iterable[StormClient], per_s: float) -> None:
    """Start them at a steady rate: after a pause of this process none hurries to make up for it.

    Who was refused now would remember it, and come back from the storm the later.
    """
    for client in clients:
        client.start()
        await asyncio.sleep(1 / per_s)


class Sender:
    """Sends messages, each to a client that waits for none."""

    def __init__(
        self, rate_per_s: float, secret: str, balancer: Balancer, watcher: Watcher
    ) -> None:
        self._balancer = balancer
        self._watcher = watcher
        self._rate_per_s = rate_per_s
        self._loop = asyncio.get_running_loop()
        self._run = secrets.token_hex(4)
        self._token = sign_token(secret, f"urn:storm:{self._run}", ["send"], _TOKEN_TTL_S)
        self.sent = 0
        self.resent = 0
        self.refused = 0

    async def run(self, clients: Sequence[StormClient]) -> None:
        """Send until cancelled."""
        began_s, due = monotonic(), 0
        while True:
            wanted = int((monotonic() - began_s) * self._rate_per_s)
            for _ in range(wanted - due):
                self._send_to_one(clients)
            due = wanted
            await asyncio.sleep(_SEND_EVERY_S)

    def _send_to_one(self, clients: Sequence[StormClient]) -> None:
        for _ in range(_DRAWS):
            client = random.choice(clients)  # noqa: S311 - spreads load
            if client not in self._watcher.under_way:
                self.sent += 1
                message = Message(f"{self._run}-{self.sent}", client, monotonic())
                self._watcher.under_way[client] = message
                self._post(message)
                return

    def _post(self, message: Message) -> None:
        message.asked_s = monotonic()
        body = json.dumps(
            {
                "recipient": message.client.recipient,
                "id": message.id,
                "body": None,
                "ttl_s": _MESSAGE_TTL_S,
            }
        ).encode()
        head = (
            f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )

        def done(answer: Answer | None) -> None:
            self._on_answer(message, answer)

        self._balancer.pick().http.send(head.encode() + body, done)

    def _on_answer(self, message: Message, answer: Answer | None) -> None:
        if answer is None:
            # It may be committed or not; with its id it can be sent again, and counts once.
            self.resent += 1
            self._loop.call_later(_RESEND_S, self._post, message)
        elif answer.status in {200, 202}:
            self._watcher.on_answered(message)
        else:
            self.refused += 1
            self._watcher.on_given_up(message)
