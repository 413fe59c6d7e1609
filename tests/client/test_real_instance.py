"""The client and the HTTP publisher against a real instance."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from pokebridge.client import PokeClient, Policy, ReceivedMessage, core
from pokebridge.errors import AuthError, ForbiddenError, TransportError
from pokebridge.model import Poke
from pokebridge.publisher import HttpPublisher
from tests.support import Instance, Serve, wait_until

BOB = "urn:user:bob"
QUICK = Policy(base_s=0.05, cap_s=0.2, poll_after_s=60.0)


class Inbox:
    """What came, by version."""

    def __init__(self) -> None:
        self.got: list[tuple[int, object]] = []

    async def __call__(self, messages: Sequence[ReceivedMessage]) -> None:
        """Keep them."""
        self.got += [(message.version, message.body) for message in messages]


async def send(instance: Instance, *bodies: object) -> None:
    """Send bob messages, one after the other."""
    async with instance.async_http("urn:backend", "send") as http:
        for body in bodies:
            answer = await http.post("/v1/messages", json={"recipient": BOB, "body": body})
            answer.raise_for_status()


async def test_every_device_gets_every_message(serve: Serve) -> None:
    """Two devices of a recipient, messages from before and after they came, acked by both."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    phone, desk = Inbox(), Inbox()
    token = instance.token(BOB)
    async with instance.async_http(BOB) as http:
        for device in ("phone", "desk"):  # so that an ack deletes no message
            await http.get("/v1/messages", params={"device": device})
    await send(instance, "before")
    async with (
        PokeClient(instance.url, token, phone, device="phone") as one,
        PokeClient(instance.url, token, desk, device="desk") as two,
    ):
        await one.wait_ready(10)
        await two.wait_ready(10)
        await send(instance, *range(60))
        expected = [(1, "before"), *((number + 2, number) for number in range(60))]
        await wait_until(lambda: phone.got == expected)
        await wait_until(lambda: desk.got == expected)
        await wait_until(lambda: one.cursor == two.cursor == 61)
    async with instance.async_http(BOB) as http:

        async def is_empty() -> bool:
            return '"messages":[]' in (await http.get("/v1/messages")).text

        await wait_until(is_empty, what="what both have acked being deleted")


async def test_nothing_is_lost_when_the_instance_is_killed(serve: Serve, tmp_path: Path) -> None:
    """Kill -9 and a restart cost the connection, and no message, in order and once each."""
    mailbox = f"sqlite:///{tmp_path / 'mailbox.db'}"
    instance = await asyncio.to_thread(serve, mailbox=mailbox)
    inbox = Inbox()
    async with PokeClient(instance.url, instance.token(BOB), inbox, policy=QUICK) as client:
        await client.wait_ready(10)
        for life in range(2):
            await send(instance, f"{life}: while connected")
            await wait_until(lambda: len(inbox.got) == life * 2 + 1)  # noqa: B023 - called here
            await asyncio.to_thread(instance.kill)
            await wait_until(lambda: not client.connected)
            await asyncio.to_thread(instance.start)
            await send(instance, f"{life}: after the restart")
            await wait_until(lambda: len(inbox.got) == life * 2 + 2)  # noqa: B023 - called here
    assert [version for version, _ in inbox.got] == [1, 2, 3, 4]


async def test_an_expiring_token_is_renewed_on_the_open_socket(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection outlives the token that it was made with, and pulls use the new one."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    monkeypatch.setattr(core, "MIN_TOKEN_REST_S", 0)
    inbox = Inbox()
    lifetimes_s = [3.0, 3600.0]
    events: list[object] = []

    async def new_token() -> str:
        return instance.token(BOB, ttl_s=lifetimes_s.pop(0))

    async with PokeClient(instance.url, new_token, inbox, on_event=events.append) as client:
        await client.wait_ready(10)
        await wait_until(lambda: '"type":"auth"' in repr(events), timeout_s=15)
        await send(instance, "hello")
        await wait_until(lambda: inbox.got == [(1, "hello")])
    assert "Closed" not in repr(events)


async def test_a_revoked_session_comes_back_with_a_new_token(serve: Serve) -> None:
    """An admin's disconnect makes the client get a token, and stay."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    inbox = Inbox()
    count = 0

    async def new_token() -> str:
        nonlocal count
        count += 1
        return instance.token(BOB)

    async with PokeClient(instance.url, new_token, inbox, policy=QUICK) as client:
        await client.wait_ready(10)
        async with instance.async_http("urn:root", "admin") as http:
            (await http.delete(f"/v1/sessions/{BOB}")).raise_for_status()
        await wait_until(lambda: count == 2)
        await client.wait_ready(10)
        await send(instance, "hello")
        await wait_until(lambda: inbox.got == [(1, "hello")])


async def test_a_replaced_client_stops(serve: Serve) -> None:
    """Above the recipient's session limit the oldest client stops for good."""
    instance = await asyncio.to_thread(serve, mailbox="memory://", max_sessions_per_recipient=1)
    token = instance.token(BOB)
    async with PokeClient(instance.url, token, Inbox()) as old:
        await old.wait_ready(10)
        async with PokeClient(instance.url, token, Inbox()) as new:
            await new.wait_ready(10)
            assert await asyncio.wait_for(old.wait_stopped(), 10) == 4409
            with pytest.raises(ForbiddenError, match="4409"):
                await old.wait_ready(10)
            assert new.connected


async def test_a_backend_pokes_over_http(serve: Serve) -> None:
    """A poke for data of the backend's own reaches a client that pulls it by itself."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    pulls = 0

    async def pull(_: int) -> None:
        nonlocal pulls
        pulls += 1

    async with (
        PokeClient(instance.url, instance.token(BOB), on_poke=pull) as client,
        HttpPublisher(instance.url, instance.token("urn:backend", "poke")) as publisher,
    ):
        await client.wait_ready(10)
        await wait_until(lambda: pulls == 1)
        await publisher.poke(BOB)
        await wait_until(lambda: pulls == 2)
        await publisher.publish([Poke(f"urn:user:{number}") for number in range(1500)])
        await publisher.publish([Poke(BOB, 3), Poke(BOB)])
        await wait_until(lambda: pulls == 3)


async def test_a_backend_hears_why_its_poke_failed(serve: Serve) -> None:
    """No token, the wrong scope and no instance are told apart."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    for token, error in (("none", AuthError), (instance.token("urn:backend"), ForbiddenError)):
        async with HttpPublisher(instance.url, token) as publisher:
            with pytest.raises(error) as caught:
                await publisher.poke(BOB)
            assert type(caught.value) is error
    await asyncio.to_thread(instance.kill)
    async with HttpPublisher(instance.url, instance.token("urn:backend", "poke")) as publisher:
        with pytest.raises(TransportError):
            await publisher.poke(BOB)
