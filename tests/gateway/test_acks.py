"""Acks over the socket: what is recorded, merged, kept during an outage, and refused."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from websockets.frames import Opcode

from pokebridge.errors import MailboxError
from pokebridge.gateway import acks as acks_module
from pokebridge.gateway.acks import Acks
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import Ack
from pokebridge.supervisor import keep_doing, task_failures
from pokebridge.testing.mailbox_kit import fill, versions
from tests.gateway.harness import BOB, Client, Running, running
from tests.support.waiting import wait_until

EVE = "urn:user:eve"


class Mailbox(MemoryMailbox):
    """A mailbox that a test can hold up, and make fail."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Sequence[Ack]] = []
        self.failures: list[Exception | asyncio.CancelledError] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def ack_all(self, acks: Sequence[Ack]) -> None:
        """Record them, when it may and can."""
        self.calls.append(acks)
        await self.goes_on.wait()
        if self.failures:
            raise self.failures.pop(0)
        await super().ack_all(acks)


async def is_acked(mailbox: Mailbox, recipient: str = BOB) -> bool:
    """Whether the mailbox has deleted all messages of ``recipient``."""
    return not await versions(mailbox, recipient)


async def acked(mailbox: Mailbox, recipient: str = BOB) -> None:
    """Wait until all messages of ``recipient`` are deleted."""
    await wait_until(lambda: is_acked(mailbox, recipient), what=f"an ack, not {mailbox.calls}")


async def are_read(client: Client) -> None:
    """Wait until the server has read all that ``client`` has sent so far."""
    client.say({"type": "ping"})
    assert (await client.message())["type"] == "pong"


async def greet(server: Running, path: str = "/v1/connect") -> object:
    """What ``ready`` says about acks."""
    client = await server.connect(path=path)
    return (await client.message()).get("acks")


# --- over a socket ------------------------------------------------------------------------------


async def test_ready_offers_acks_where_there_is_a_mailbox() -> None:
    """``acks`` is true, or is not there at all."""
    async with running(record_acks=Mailbox().ack_all) as server:
        assert await greet(server) is True
    async with running() as server:
        assert await greet(server) is None


async def test_an_ack_counts_for_the_sessions_device() -> None:
    """The device is the one that the session was opened for; every known device has to ack."""
    mailbox = Mailbox()
    await fill(mailbox, 3)
    await mailbox.see_device(BOB, "phone")
    async with running(record_acks=mailbox.ack_all) as server:
        phone = await server.open(path="/v1/connect?device=phone")
        nameless = await server.open()
        nameless.say({"type": "ack", "version": 3})
        await wait_until(lambda: mailbox.calls == [[(BOB, "default", 3)]])
        assert await versions(mailbox) == [1, 2, 3]
        phone.say({"type": "ack", "version": 2, "device": "default"})
        await wait_until(lambda: len(mailbox.calls) == 2)
        assert mailbox.calls[1] == [(BOB, "phone", 2)]
        assert await versions(mailbox) == [3]


async def test_an_ack_is_not_answered_and_frames_may_be_in_pieces() -> None:
    """After an ack, one in fragments here, comes the answer to the ping that follows it."""
    mailbox = Mailbox()
    await fill(mailbox, 2)
    async with running(record_acks=mailbox.ack_all) as server:
        client = await server.open()
        text = json.dumps({"type": "ack", "version": 2}).encode()
        client.send_raw(client_frame(text[:5], first=True) + client_frame(text[5:], first=False))
        await are_read(client)
        await acked(mailbox)


def client_frame(part: bytes, *, first: bool) -> bytes:
    """The first or the last of two fragments, masked with zeros."""
    return bytes((0x01 if first else 0x80, 0x80 | len(part))) + bytes(4) + part


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "ack"},
        {"type": "ack", "version": -1},
        {"type": "ack", "version": "7"},
        {"type": "ack", "version": 2**53},
    ],
)
async def test_a_malformed_ack_closes_1008(frame: object) -> None:
    """It is treated like any other text that is not a client message, and nothing is recorded."""
    mailbox = Mailbox()
    async with running(record_acks=mailbox.ack_all) as server:
        client = await server.open()
        client.say(frame)
        assert await client.closed() == 1008
    assert mailbox.calls == []


async def test_an_ack_where_none_was_offered_closes_1008() -> None:
    """As an instance of release 0.1.0 does, and one without a mailbox."""
    async with running() as server:
        client = await server.open()
        client.say({"type": "ack", "version": 1})
        assert await client.closed() == 1008


async def test_acks_count_as_frames() -> None:
    """More acks in a ping interval than our clients send close the session with 1008."""
    async with running(record_acks=Mailbox().ack_all) as server:
        client = await server.open()
        for version in range(1, 1002):
            client.say({"type": "ack", "version": version})
        assert await client.closed() == 1008


async def test_a_burst_of_acks_makes_few_calls() -> None:
    """While a call is under way all acks of all sessions wait for one next call, merged."""
    mailbox = Mailbox()
    await fill(mailbox, 100, BOB)
    await fill(mailbox, 100, EVE)
    async with running(record_acks=mailbox.ack_all) as server:
        bob, eve = await server.open(BOB), await server.open(EVE)
        mailbox.goes_on.clear()
        bob.say({"type": "ack", "version": 1})
        await wait_until(lambda: mailbox.calls)
        for version in [*range(2, 101), 50]:
            bob.say({"type": "ack", "version": version})
            eve.say({"type": "ack", "version": version})
        await are_read(bob)
        await are_read(eve)
        mailbox.goes_on.set()
        await acked(mailbox, BOB)
        await acked(mailbox, EVE)
        assert len(mailbox.calls) == 2
        assert sorted(mailbox.calls[1]) == [(BOB, "default", 100), (EVE, "default", 100)]
        assert server.gateway.acks is not None
        assert server.gateway.acks.heard == 201
        assert server.gateway.acks.recorded == 3


async def test_an_outage_of_the_mailbox_closes_no_session() -> None:
    """Acks during the outage are recorded afterwards, even if the session has ended."""
    mailbox = Mailbox()
    await fill(mailbox, 5, BOB)
    await fill(mailbox, 5, EVE)
    mailbox.failures = [MailboxError("away")] * 3
    async with running(record_acks=mailbox.ack_all) as server:
        bob, eve = await server.open(BOB), await server.open(EVE)
        eve.say({"type": "ack", "version": 5})
        await are_read(eve)
        await eve.close()
        bob.say({"type": "ack", "version": 4})
        await wait_until(lambda: not mailbox.failures)
        bob.say({"type": "ack", "version": 5})
        await acked(mailbox, BOB)
        await acked(mailbox, EVE)
        await are_read(bob)
        assert len(mailbox.calls) < 10, "the calls are paced"


async def test_a_session_that_ends_with_its_ack_has_acked() -> None:
    """An ack right before the close frame counts."""
    mailbox = Mailbox()
    await fill(mailbox, 2)
    async with running(record_acks=mailbox.ack_all) as server:
        client = await server.open()
        client.say({"type": "ack", "version": 2})
        client.send(Opcode.CLOSE, (1000).to_bytes(2, "big"))
        assert await client.closed() == 1000
        await acked(mailbox)


# --- by itself ----------------------------------------------------------------------------------


async def test_what_fails_is_merged_with_what_came_meanwhile() -> None:
    """The newest version of each device is kept, whether it failed or came later."""
    mailbox = Mailbox()
    mailbox.failures = [MailboxError("away")]
    mailbox.goes_on.clear()
    acks = Acks(mailbox.ack_all)
    told: list[tuple[str, int]] = []
    acks.on_recorded = lambda recipient, version: told.append((recipient, version))
    for recipient in (BOB, EVE):
        acks.add(recipient, "phone", 5)
    failing = asyncio.create_task(acks.record())
    await wait_until(lambda: mailbox.calls)
    acks.add(BOB, "phone", 4)
    acks.add(EVE, "phone", 6)
    mailbox.goes_on.set()
    with pytest.raises(MailboxError):
        await failing
    assert told == []
    await acks.record()
    assert sorted(mailbox.calls[-1]) == [(BOB, "phone", 5), (EVE, "phone", 6)]
    assert sorted(told) == [(BOB, 5), (EVE, 6)]


async def test_many_pending_acks_are_recorded_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call has more than the port allows, and all are recorded."""
    monkeypatch.setattr(acks_module, "ACKS_BATCH", 3)
    mailbox = Mailbox()
    acks = Acks(mailbox.ack_all)
    for number in range(8):
        acks.add(f"urn:user:{number}", "phone", number)
    await acks.record()
    assert [len(call) for call in mailbox.calls] == [3, 3, 2]
    assert sorted(ack.version for call in mailbox.calls for ack in call) == list(range(8))


async def test_pending_acks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound an ack of a further device is dropped; those of the others still merge."""
    monkeypatch.setattr(acks_module, "MAX_PENDING", 2)
    mailbox = Mailbox()
    acks = Acks(mailbox.ack_all)
    for recipient, version in (("a", 1), ("b", 1), ("c", 1), ("a", 2)):
        acks.add(recipient, "phone", version)
    await acks.record()
    assert mailbox.calls == [[("a", "phone", 2), ("b", "phone", 1)]]
    acks.add("c", "phone", 1)
    await acks.record()
    assert mailbox.calls[1:] == [[("c", "phone", 1)]]


@pytest.mark.parametrize("error", [RuntimeError("a defect"), asyncio.CancelledError()])
async def test_no_error_ends_the_recording(error: Exception | asyncio.CancelledError) -> None:
    """A defect is noted, and costs its own batch at most; a cancelled driver costs nothing."""
    mailbox = Mailbox()
    mailbox.failures = [error]
    acks = Acks(mailbox.ack_all)
    failures_before = task_failures["acks_under_test"]
    task = keep_doing("acks_under_test", acks.record, 0.01)
    acks.add(BOB, "phone", 1)
    await wait_until(lambda: task_failures["acks_under_test"] > failures_before)
    acks.add(EVE, "phone", 1)
    await wait_until(lambda: any(ack.recipient == EVE for ack in mailbox.calls[-1]))
    kept = [ack.recipient for call in mailbox.calls[1:] for ack in call]
    assert (BOB in kept) == isinstance(error, asyncio.CancelledError)
    task.cancel()
