"""Push fallback on real instances: an API that commits and is pulled, a processor that pushes."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import websockets

from pokebridge.testing.mailbox_kit import ALICE, BOB, EVE
from tests.fallback.receiver import Receiver, receiving
from tests.fallback.test_docs import is_genuine
from tests.support import Daemon, Instance, Serve, wait_until

SECRET = "whsec_" + "b2xkIHNlY3JldHMgYXJlIGJhZCBvbmVz"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that is up."""
    async with receiving() as receiver:
        yield receiver


class Apart(NamedTuple):
    """An instance with the role api, and one with the role processor."""

    api: Instance
    processor: Instance


@pytest.fixture
async def apart(
    request: pytest.FixtureRequest,
    serve: Serve,
    receiver: Receiver,
    nats_server: Daemon,
    tmp_path: Path,
) -> Apart:
    """Both of them, with a grace of a second."""
    mailbox = f"sqlite:///{tmp_path}/mailbox.db"
    if request.param == "postgresql":
        mailbox = request.getfixturevalue("postgres_database")
    start = partial(
        serve,
        mailbox=mailbox,
        transport=nats_server.url,
        cluster=f"push-{secrets.token_hex(4)}",
        push_webhook_url=receiver.url,
        push_grace_s=1.0,
        push_quiet_s=60,
    )
    roles: list[dict[str, str]] = [
        {"roles": "api"},
        {"roles": "processor", "push_webhook_secret": SECRET},
    ]
    return Apart(*await asyncio.gather(*(asyncio.to_thread(start, **role) for role in roles)))


async def send(api: Instance, recipient: str, **more: object) -> None:
    """Send a message."""
    async with api.async_http(ALICE, "send") as http:
        body = {"recipient": recipient, "body": "secret"} | more
        answer = await http.post("/v1/messages", json=body)
        assert answer.status_code == httpx.codes.ACCEPTED


@pytest.mark.parametrize("apart", ["sqlite", "postgresql"], indirect=True)
async def test_who_pulls_is_not_pushed(apart: Apart, receiver: Receiver) -> None:
    """Bob sleeps and is told of, once, signed; Eve pulls in time, Dan acks, Joe is told nothing.

    Kit's conditional pull with the head he has counts like any other.
    """
    dan, joe, kit = (f"urn:user:{name}" for name in ("dan", "joe", "kit"))
    await send(apart.api, joe, ephemeral=True)
    for recipient in (EVE, dan, kit):
        await send(apart.api, recipient)
    async with apart.api.async_http(EVE) as http:
        assert len((await http.get("/v1/messages")).json()["messages"]) == 1
    async with apart.api.async_http(kit) as http:
        tag = (await http.get("/v1/messages?after=1")).headers["etag"]
        answer = await http.get("/v1/messages", headers={"If-None-Match": tag})
        assert answer.status_code == httpx.codes.NOT_MODIFIED
    async with apart.api.async_http(dan) as http:
        await http.post("/v1/messages/ack", json={"version": 1})
    for _ in range(3):
        await send(apart.api, BOB)
    await wait_until(lambda: receiver.requests)
    [request] = receiver.requests
    assert request.json == {"recipient": BOB, "version": 3}
    assert is_genuine()(SECRET, request.headers, request.body)
    async with apart.processor.async_http() as http:

        async def is_counted() -> bool:
            metrics = (await http.get("/metrics")).text
            assert 'pokebridge_pushes_total{result="failed"} 0.0' in metrics
            return 'pokebridge_pushes_total{result="sent"} 1.0' in metrics

        await wait_until(is_counted)


async def test_an_ack_over_the_socket_cancels_a_push(
    serve: Serve, receiver: Receiver, tmp_path: Path
) -> None:
    """Bob acks on his socket what he never pulled, and is not told; Eve does not, and is."""
    instance = await asyncio.to_thread(
        serve,
        mailbox=f"sqlite:///{tmp_path}/mailbox.db",
        push_webhook_url=receiver.url,
        push_webhook_secret=SECRET,
        push_grace_s=2.0,
    )
    headers = instance.headers(BOB)
    async with websockets.connect(instance.ws_url, additional_headers=headers) as socket:
        await socket.recv()
        await send(instance, BOB)
        await socket.send('{"type":"ack","version":1}')
        await send(instance, EVE)
        await wait_until(lambda: receiver.requests)
    assert receiver.arrived == {EVE: 1}


@pytest.mark.parametrize("apart", ["sqlite"], indirect=True)
async def test_a_killed_processor_leaves_its_pushes_to_the_next(
    apart: Apart, receiver: Receiver
) -> None:
    """SIGKILL before they are due: who starts next tells of each once; the API tells of none."""
    recipients = [f"urn:user:{n}" for n in range(10)]
    for recipient in recipients:
        await send(apart.api, recipient)
    await asyncio.to_thread(apart.processor.kill)
    due_s = time.monotonic() + 1.0
    await wait_until(lambda: time.monotonic() > due_s)
    assert not receiver.requests
    await asyncio.to_thread(apart.processor.start)
    await wait_until(lambda: len(receiver.arrived) == 10)
    assert receiver.arrived == dict.fromkeys(recipients, 1)
