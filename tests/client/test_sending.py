"""Sending messages from a backend's code: ``HttpPublisher.send`` against a real instance."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from pokebridge import http_publisher
from pokebridge.errors import (
    AuthError,
    ForbiddenError,
    InputError,
    MailboxFullError,
    TransportError,
)
from pokebridge.publisher import HttpPublisher
from tests.client.between import STRANGERS, Between, problem
from tests.support import Instance, Serve

BOB = "urn:user:bob"
SHOP = "urn:service:shop"


@pytest.fixture
def instance(serve: Serve) -> Instance:
    """An instance whose mailboxes hold two messages."""
    limits = ("--max-messages-per-recipient", "2", "--max-share-per-sender", "1")
    return serve(*limits, mailbox="sqlite:///sent.db")


@pytest.fixture
async def publisher(instance: Instance) -> AsyncIterator[HttpPublisher]:
    """A backend that may send."""
    async with HttpPublisher(instance.url, instance.token(SHOP, "send")) as publisher:
        yield publisher


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat what failed soon."""
    monkeypatch.setattr(http_publisher, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(http_publisher, "LAST_RETRY_S", 0.1)


async def bodies(instance: Instance) -> list[object]:
    """What waits for Bob."""
    async with instance.async_http(BOB) as http:
        return [each["body"] for each in (await http.get("/v1/messages")).json()["messages"]]


async def test_a_message_is_sent(instance: Instance, publisher: HttpPublisher) -> None:
    """The id is random or the caller's. With the caller's id a repeat commits nothing."""
    first = await publisher.send(BOB, {"text": "grüezi"})
    again = [await publisher.send(BOB, [1], message_id="order-7") for _ in range(2)]
    assert (first.version, first.duplicate) == (1, False)
    assert [(each.id, each.version, each.duplicate) for each in again] == [
        ("order-7", 2, False),
        ("order-7", 2, True),
    ]
    assert await bodies(instance) == [{"text": "grüezi"}, [1]]


async def test_an_instance_that_restarts_is_waited_for(
    instance: Instance, publisher: HttpPublisher
) -> None:
    """The message is committed once, however often it was sent."""
    await asyncio.to_thread(instance.kill)
    sending = asyncio.create_task(publisher.send(BOB, "soon", timeout_s=100))
    await asyncio.to_thread(instance.start)
    assert (await sending).version == 1
    assert await bodies(instance) == ["soon"]


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_a_stranger_has_sent_nothing(instance: Instance, stranger: str) -> None:
    """What stands between answers once; the message is sent again, and committed once."""
    async with Between(instance.port).run() as between:
        between.answers["/v1/messages"] = [STRANGERS[stranger], problem(503)]
        async with HttpPublisher(between.url, instance.token(SHOP, "send")) as publisher:
            assert (await publisher.send(BOB, stranger)).version == 1
    assert await bodies(instance) == [stranger]


async def test_what_was_committed_and_not_told_is_told_later(instance: Instance) -> None:
    """The answer got lost: the repeated send has the same id."""
    async with Between(instance.port).run() as between:
        async with HttpPublisher(instance.url, instance.token(SHOP, "send")) as direct:
            await direct.send(BOB, "once", message_id="7")
        between.answers["/v1/messages"] = [STRANGERS["nothing"]]
        async with HttpPublisher(between.url, instance.token(SHOP, "send")) as publisher:
            receipt = await publisher.send(BOB, "once", message_id="7")
    assert (receipt.version, receipt.duplicate) == (1, True)
    assert await bodies(instance) == ["once"]


async def test_refusals_are_not_repeated(instance: Instance, publisher: HttpPublisher) -> None:
    """Each kind has its error, at once."""
    for _ in range(2):
        await publisher.send(BOB, None)
    with pytest.raises(MailboxFullError, match="507"):
        await publisher.send(BOB, None)
    with pytest.raises(InputError, match="a recipient is"):
        await publisher.send("two words", None)
    with pytest.raises(InputError, match="body"):
        await publisher.send(BOB, object())
    with pytest.raises(InputError, match="413"):
        await publisher.send(BOB, "x" * 200_000)
    async with HttpPublisher(instance.url, instance.token(SHOP, "poke")) as poker:
        with pytest.raises(ForbiddenError, match="send"):
            await poker.send(BOB, None)
    async with HttpPublisher(instance.url, "a.b.c") as stranger:
        with pytest.raises(AuthError):
            await stranger.send(BOB, None)


@pytest.mark.parametrize("token", ["secret.token\n", "sécret", ""])
async def test_no_error_shows_a_token(token: str) -> None:
    """One that no header can bring, like a file's with its line end, is refused and not shown."""
    async with HttpPublisher("http://127.0.0.1:9", token) as publisher:
        for call in (publisher.send(BOB, None), publisher.poke(BOB)):
            with pytest.raises(AuthError, match="a token must be visible ASCII") as refused:
                await call
            assert "cret" not in repr(refused.value)


async def test_patience_ends(instance: Instance, publisher: HttpPublisher) -> None:
    """Without an answer the error names the URL."""
    await asyncio.to_thread(instance.kill)
    with pytest.raises(TransportError, match=instance.url):
        await publisher.send(BOB, None, timeout_s=0.1)
