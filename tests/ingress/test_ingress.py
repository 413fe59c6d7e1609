"""Ingress: what a queue delivers is committed once and acked then, or put aside with why."""

import asyncio
import json
import re
import secrets
import socket
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import nats
import pytest
from nats.js.api import RetentionPolicy, StreamConfig
from structlog.testing import capture_logs

from pokebridge.errors import ConfigError, MailboxError, TransportError
from pokebridge.ingress import ingress as ingress_module
from pokebridge.ingress import nats as nats_ingress
from pokebridge.ingress.base import DEAD_BODY_BYTES, Delivery, Source
from pokebridge.ingress.google_pubsub import GooglePubSubSource
from pokebridge.ingress.ingress import Ingress
from pokebridge.ingress.nats import NatsSource
from pokebridge.mailbox import postgres, postgres_pool
from pokebridge.mailbox.base import Limits
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.mailbox.postgres import PostgresMailbox
from pokebridge.model import NewMessage, Receipt
from pokebridge.submission import read_queued
from pokebridge.testing.mailbox_kit import ALICE, BOB, EVE, head, versions
from pokebridge.testing.pubsub import PubSubServer
from tests.ingress.queues import DeadLetter, NatsQueue, PubSubQueue, Queue
from tests.support import Daemon, free_port, wait_until
from tests.support.engines import BIN


def order(recipient: str = BOB, **more: Any) -> bytes:
    """A message as a backend would publish it."""
    return json.dumps({"sender": ALICE, "recipient": recipient, "body": {"n": 1}} | more).encode()


@pytest.fixture(params=["nats", "pubsub-emulator", "pubsub-server"])
async def queue(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Queue]:
    """A queue on each engine."""
    monkeypatch.setattr(nats_ingress, "ACK_WAIT_S", 1.0)
    if request.param == "nats":
        queue: Queue = await NatsQueue.make(request.getfixturevalue("nats_server").url)
        yield queue
        await queue.close()
    elif request.param == "pubsub-emulator":
        address = request.getfixturevalue("pubsub_emulator")
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        queue = await PubSubQueue.make(address)
        yield queue
        await queue.close()
    else:
        async with PubSubServer() as server:
            monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
            queue = await PubSubQueue.make(server.address)
            yield queue
            await queue.close()


@pytest.fixture
async def nats_queue(
    nats_server: Daemon, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[NatsQueue]:
    """A queue on the shared NATS server."""
    monkeypatch.setattr(nats_ingress, "ACK_WAIT_S", 1.0)
    queue = await NatsQueue.make(nats_server.url)
    yield queue
    await queue.close()


class Sender:
    """Commits to a mailbox; can be away, or have a defect."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.mailbox = MemoryMailbox(limits=limits)
        self.is_away = False
        self.defect_in = ""
        self.calls = 0
        self.most_at_once = self._at_once = 0

    async def send(self, message: NewMessage) -> Receipt:
        """Commit ``message``."""
        self.calls += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(0)
            if self.is_away:
                raise MailboxError("away")
            if message.id == self.defect_in:
                raise RuntimeError("bug")
            return await self.mailbox.append(message)
        finally:
            self._at_once -= 1


@asynccontextmanager
async def reading(source: Source, sender: Sender) -> AsyncIterator[Ingress]:
    """An ingress that is running."""
    ingress = Ingress(source, read_queued, sender.send)
    await ingress.start()
    try:
        yield ingress
    finally:
        await ingress.close()


async def buried(queue: Queue, count: int) -> list[DeadLetter]:
    """The first ``count`` dead letters."""
    found: list[DeadLetter] = []

    async def are_there() -> bool:
        found.extend(await queue.dead_letters())
        return len(found) >= count

    await wait_until(are_there)
    return found


async def test_what_is_published_is_committed(queue: Queue) -> None:
    """More than a batch of messages: each once, from the sender that its body names."""
    sender = Sender()
    async with reading(await queue.source(), sender) as ingress:
        await queue.publish(*(order(body=n) for n in range(300)))
        await queue.publish(order(EVE, id="order-7", ttl_s=60))
        await wait_until(lambda: ingress.results["committed"] == 301, what=f"{ingress.results}")
    page = await sender.mailbox.read(BOB, after=0, limit=500)
    assert sorted(int(kept.body) for kept in page.messages) == list(range(300))
    assert {kept.sender for kept in page.messages} == {ALICE}
    [named] = (await sender.mailbox.read(EVE, after=0, limit=1)).messages
    assert (named.id, named.body) == ("order-7", b'{"n": 1}')
    assert sender.most_at_once <= ingress_module.BATCH


async def test_a_redelivery_commits_nothing(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acks that were lost after the commit: the messages come again, and are known by their ids."""
    source, sender = await queue.source(), Sender()
    failures = 1
    ack = source.ack

    async def lossy(deliveries: list[Delivery]) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            await source.retry(deliveries, delay_s=0)  # what the engine does by itself, in time
            raise TransportError("cut off")
        await ack(deliveries)

    monkeypatch.setattr(source, "ack", lossy)
    async with reading(source, sender) as ingress:
        await queue.publish(order(), order(EVE, id="order-7"))
        await wait_until(lambda: ingress.results["duplicate"] >= 1)
        await wait_until(lambda: ingress.results["committed"] + ingress.results["duplicate"] >= 3)
    assert await versions(sender.mailbox, BOB) == [1]
    assert await versions(sender.mailbox, EVE) == [1]


async def test_poison_is_put_aside_with_the_reason(queue: Queue) -> None:
    """What can never be committed goes where it can be looked at; its neighbours are committed."""
    poison = {
        b"Dear Bob": "the body is not JSON",
        b'{"recipient": "b", "body": 1}': "missing required field `sender`",
        order("not a recipient"): "a recipient is 1 to 256 visible ASCII characters",
        order(sender="\n"): "a recipient is 1 to 256 visible ASCII characters",
        order(body="x" * 70_000): "at most 65536 bytes",
        order(colour="red"): "unknown field `colour`",
        b"[" * 100_000: "",
    }
    sender = Sender()
    async with reading(await queue.source(), sender) as ingress:
        await queue.publish(order(), *poison, order())
        dead = await buried(queue, len(poison))
        await wait_until(lambda: ingress.results["committed"] == 2)
    assert {letter.body for letter in dead} == set(poison)
    for letter in dead:
        assert poison[letter.body] in letter.reason
    assert ingress.results["refused"] == len(poison)


async def test_a_dead_letter_has_room_for_its_reason(queue: Queue) -> None:
    """A refused message of the largest size is cut, so that it fits among the dead letters."""
    largest_bytes = 1024 * 1024 if isinstance(queue, NatsQueue) else 9_999_900
    async with reading(await queue.source(), Sender()) as ingress:
        await queue.publish(b"x" * largest_bytes, order())
        [letter] = await buried(queue, 1)
        await wait_until(lambda: ingress.results["committed"] == 1)
    assert letter.body == b"x" * DEAD_BODY_BYTES


async def test_dead_letters_are_kept_after_their_place_was_deleted(queue: Queue) -> None:
    """Nothing is published while no subscription keeps it."""
    async with reading(await queue.source(), Sender()):
        await queue.publish(b"no JSON")
        await buried(queue, 1)
        await queue.delete_dead_letters()
        await queue.publish(b"no JSON either")
        [letter] = await buried(queue, 1)
    assert letter.body == b"no JSON either"


async def test_dead_letters_wait_for_a_subscription_that_keeps_them(
    pubsub_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detached subscription keeps nothing, so dead letters wait until it is deleted."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub_emulator)
    monkeypatch.setattr(ingress_module, "RETRY_DELAY_S", 0.0)
    queue = await PubSubQueue.make(pubsub_emulator)
    with capture_logs() as logs:
        async with reading(await queue.source(), Sender()) as ingress:
            await queue.publish(b"no JSON")
            await buried(queue, 1)
            await queue.delete_dead_topic()
            await queue.publish(b"no JSON either")
            await wait_until(lambda: ingress.is_down)
            await queue.delete_dead_letters()
            [letter] = await buried(queue, 1)
    assert letter.body == b"no JSON either"
    [reason] = {line["error"] for line in logs if line["event"] == "part_unavailable"}
    assert "is not attached to" in reason
    await queue.close()


@pytest.mark.parametrize("retention", [RetentionPolicy.LIMITS, RetentionPolicy.WORK_QUEUE])
async def test_a_stream_that_takes_its_own_dead_letters(
    nats_server: Daemon, retention: RetentionPolicy
) -> None:
    """Poison is put aside once, not again and again; what would be lost is not acked."""
    cluster, stream = f"test-{secrets.token_hex(4)}", f"OWN-{secrets.token_hex(4)}"
    client = await nats.connect(nats_server.url)
    jetstream, subjects = client.jetstream(), [f"pokebridge.{cluster}.*"]
    await jetstream.add_stream(name=stream, subjects=subjects, retention=retention)
    source = NatsSource(f"{nats_server.url}/{stream}", cluster=cluster)
    async with reading(source, Sender()) as ingress:
        await jetstream.publish(f"pokebridge.{cluster}.in", b"no JSON")
        is_kept = retention is RetentionPolicy.LIMITS
        await wait_until(lambda: ingress.results["refused"] == 2 if is_kept else ingress.is_down)
        await jetstream.publish(f"pokebridge.{cluster}.in", order())
        await wait_until(lambda: ingress.results["committed"] == 1)

        async def are_left() -> bool:
            state = (await jetstream.stream_info(stream)).state
            return state.messages == (3 if is_kept else 1)

        await wait_until(are_left)
    await jetstream.delete_stream(stream)
    await client.close()


async def test_what_a_full_mailbox_refuses_is_put_aside(queue: Queue) -> None:
    """No sender waits for an answer, so the message becomes a dead letter."""
    sender = Sender(Limits(max_messages=1))
    async with reading(await queue.source(), sender):
        await queue.publish(order(), order(), order(EVE))
        [letter] = await buried(queue, 1)
        await wait_until(lambda: sender.calls == 3)
    assert "mailbox is full" in letter.reason
    assert await versions(sender.mailbox, EVE) == [1]


async def test_nothing_is_acked_while_the_mailbox_is_away(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages stay in the queue during an outage, and are committed once after it."""
    monkeypatch.setattr(ingress_module, "RETRY_DELAY_S", 0.0)
    sender = Sender()
    sender.is_away = True
    with capture_logs() as logs:
        async with reading(await queue.source(), sender) as ingress:
            await queue.publish(*(order(body=n) for n in range(5)))
            await wait_until(lambda: ingress.results["retried"] >= 10)
            sender.is_away = False
            await wait_until(lambda: ingress.results["committed"] == 5)
    assert await versions(sender.mailbox) == [1, 2, 3, 4, 5]
    assert [line["event"] for line in logs] == ["part_unavailable", "part_is_back"]
    assert await queue.dead_letters() == []


async def test_a_defect_holds_nobody_up(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that meets a defect five times becomes a dead letter with the error."""
    monkeypatch.setattr(ingress_module, "RETRY_DELAY_S", 0.0)
    sender = Sender()
    sender.defect_in = "order-7"
    with capture_logs() as logs:
        async with reading(await queue.source(), sender) as ingress:
            await queue.publish(order(id="order-7"), order(EVE))
            [letter] = await buried(queue, 1)
            await wait_until(lambda: ingress.results["committed"] == 1)
    assert [line["event"] for line in logs].count("task_failed") == 1
    assert "RuntimeError('bug')" in letter.reason
    assert ingress.results["retried"] == ingress_module.MAX_DEFECTS - 1


async def test_an_unforeseen_error_in_reading_is_a_refusal(nats_queue: NatsQueue) -> None:
    """The message is put aside at once, with one line and without a traceback, and others go on."""

    def read(body: bytes, delivery_id: str) -> NewMessage:
        if b"poison" in body:
            raise ZeroDivisionError("made up")
        return read_queued(body, delivery_id)

    sender = Sender()
    with capture_logs() as logs:
        ingress = Ingress(await nats_queue.source(), read, sender.send)
        await ingress.start()
        await nats_queue.publish(*[order(id="poison")] * 3, order(EVE))
        letters = await buried(nats_queue, 3)
        await wait_until(lambda: ingress.results["committed"] == 1)
        await ingress.close()
    assert {letter.reason for letter in letters} == {"unexpected error: ZeroDivisionError"}
    assert [line["border"] for line in logs if line["event"] == "unforeseen_input"] == ["ingress"]
    assert not [line for line in logs if "exc_info" in line]


async def test_two_processors_share_a_queue(queue: Queue) -> None:
    """Each message goes to one of them; what one had taken when it died, the other gets."""
    one, other = Sender(), Sender()
    dying = await queue.source()
    await queue.publish(*(order(body=n) for n in range(20)))
    taken = await dying.fetch(5)
    assert taken
    await dying.retry(taken, delay_s=0)
    await dying.close()
    async with (
        reading(await queue.source(), one) as first,
        reading(await queue.source(), other) as second,
    ):
        await wait_until(lambda: first.results["committed"] + second.results["committed"] == 20)
    bodies = [
        kept.body
        for sender in (one, other)
        for kept in (await sender.mailbox.read(BOB, after=0, limit=100)).messages
    ]
    assert sorted(map(int, bodies)) == list(range(20))


async def test_closing_settles_what_was_taken(nats_queue: NatsQueue) -> None:
    """An orderly stop amid a batch acks what it commits: nothing is left to deliver again."""
    sender = Sender()
    async with reading(await nats_queue.source(), sender):
        await nats_queue.publish(*(order(body=n) for n in range(50)))
        await wait_until(lambda: sender.calls > 0)
    count = await head(sender.mailbox, BOB)

    async def is_settled() -> bool:  # the server counts acks a moment after it was sent them
        return await nats_queue.unacked() == 50 - count

    await wait_until(is_settled, what=f"{50 - count} messages left")


async def test_a_killed_nats_comes_back(
    own_nats_server: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is read on after the engine's death, also when that was not there at the start."""
    monkeypatch.setattr(nats_ingress, "ACK_WAIT_S", 1.0)
    queue = await NatsQueue.make(own_nats_server.url)
    sender = Sender()
    await asyncio.to_thread(own_nats_server.kill)
    async with reading(await queue.source(), sender) as ingress:
        await wait_until(lambda: ingress.is_down)
        await asyncio.to_thread(own_nats_server.start)
        await queue.publish(order())
        await wait_until(lambda: ingress.results["committed"] == 1)
        assert not ingress.is_down
        await asyncio.to_thread(own_nats_server.kill)
        await wait_until(lambda: ingress.is_down)
        await asyncio.to_thread(own_nats_server.start)
        await queue.publish(order())
        await wait_until(lambda: ingress.results["committed"] == 2)
    assert await versions(sender.mailbox) == [1, 2]
    await queue.close()


async def test_a_restarted_pubsub_server_is_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of the server loses nothing."""
    async with PubSubServer() as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        queue = await PubSubQueue.make(server.address)
        sender = Sender()
        async with reading(await queue.source(), sender) as ingress:
            await server.stop()
            await wait_until(lambda: ingress.is_down)
            await server.start()
            await queue.publish(order())
            await wait_until(lambda: ingress.results["committed"] == 1)
        await queue.close()


async def test_a_subject_of_the_stream_is_read(nats_queue: NatsQueue) -> None:
    """Other subjects of the same stream are other people's."""
    sender = Sender()
    async with reading(await nats_queue.source(), sender) as ingress:
        await nats_queue.publish_beside(order(EVE))
        await nats_queue.publish(order())
        await wait_until(lambda: ingress.results["committed"] == 1)
    assert await head(sender.mailbox, EVE) == 0


async def test_a_stream_that_is_missing_is_named(nats_server: Daemon) -> None:
    """The log says what to make, and it is tried again."""
    source = NatsSource(f"{nats_server.url}/NOWHERE", cluster="c")
    with pytest.raises(TransportError, match="the stream NOWHERE does not exist"):
        await source.fetch(1)
    await source.close()
    with pytest.raises(TransportError, match="closed"):
        await source.fetch(1)


async def test_a_consumer_that_is_deleted_is_made_again(nats_queue: NatsQueue) -> None:
    """With or without its stream: new messages are committed, old ones are not repeated."""
    jetstream, sender = nats_queue._jetstream, Sender()
    async with reading(await nats_queue.source(), sender) as ingress:
        await nats_queue.publish(order(body=1))
        await wait_until(lambda: ingress.results["committed"] == 1)
        await jetstream.delete_consumer(nats_queue.stream, f"pokebridge-{nats_queue.cluster}")
        await nats_queue.publish(order(body=2))
        await wait_until(lambda: ingress.results["committed"] == 2, 30)
        await jetstream.delete_stream(nats_queue.stream)
        await wait_until(lambda: ingress.is_down, 30)
        subjects = [nats_queue.subject.replace("paid", "*")]
        await jetstream.add_stream(name=nats_queue.stream, subjects=subjects)
        await nats_queue.publish(order(body=3))
        await wait_until(lambda: ingress.results["committed"] == 3, 30)
    page = await sender.mailbox.read(BOB, after=0, limit=10)
    assert [kept.body for kept in page.messages] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    "url", ["nats://h:4222", "nats://h:4222/a.b", "nats:///S", "nats://h:4222/S?colour=red"]
)
def test_a_wrong_nats_url_is_refused(url: str) -> None:
    """One line says what it looks like."""
    with pytest.raises(ConfigError, match="the ingress URL"):
        NatsSource(url, cluster="c")


@pytest.mark.parametrize("url", ["nats:me:pa55@h/S", "pa55"])
def test_a_url_without_a_scheme_is_not_shown(url: str) -> None:
    """It is refused, and the password in it is not in the message."""
    with pytest.raises(ConfigError, match="the ingress URL must begin with a scheme") as refusal:
        NatsSource(url, cluster="c")
    assert "pa55" not in str(refusal.value)


@pytest.mark.parametrize("url", ["pubsub://", "pubsub://p", "pubsub:///s", "pubsub://p/a/b"])
async def test_a_wrong_pubsub_url_is_refused(url: str) -> None:
    """One line says what it looks like."""
    with pytest.raises(ConfigError, match="the ingress URL"):
        await GooglePubSubSource.connect(url)


def permissions() -> str:
    """The configuration of a server in the docs."""
    docs = (Path(__file__).parents[2] / "docs" / "ingress.md").read_text()
    [block] = re.findall(r"^    authorization \{\n.+?^    \}\n", docs, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(block)


@pytest.fixture
def guarded_nats(tmp_path: Path) -> Iterator[Callable[[str], Daemon]]:
    """Start NATS with JetStream and what the docs grant, but for lines that name ``without``."""
    started: list[Daemon] = []

    def start(without: str) -> Daemon:
        lines = permissions().splitlines()
        granted = "\n".join(line for line in lines if not without or without not in line)
        granted = granted.replace("users = [", "users = [ { user: admin, password: pw }, ")
        config = tmp_path / "nats.conf"
        config.write_text(f"{granted}\njetstream {{ store_dir: {tmp_path}/jetstream }}\n")
        port = free_port()
        command = [str(BIN / "nats-server"), "--addr", "127.0.0.1", "--port", f"{port}"]
        daemon = Daemon(
            "nats-server",
            [*command, "--config", str(config)],
            port=port,
            url=f"nats://admin:pw@127.0.0.1:{port}",
            directory=tmp_path,
        )
        daemon.start()
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.kill()


@asynccontextmanager
async def guarded(server: Daemon) -> AsyncIterator[tuple[NatsQueue, Source]]:
    """The stream of the docs' example, and an end of the user's who has just the permissions."""
    queue = await NatsQueue.make(server.url, stream="ORDERS", cluster="default")
    source = NatsSource(queue.url.replace("admin:", "pokebridge:"), cluster="default")
    try:
        yield queue, source
    finally:
        await source.close()
        await queue.close()


async def test_what_the_docs_grant_is_enough(guarded_nats: Callable[[str], Daemon]) -> None:
    """With just these permissions messages are committed, and poison is put aside."""
    server = await asyncio.to_thread(guarded_nats, "")
    async with guarded(server) as (queue, source), reading(source, Sender()) as ingress:
        await queue.publish(order(), b"Dear Bob")
        await buried(queue, 1)
        await wait_until(lambda: ingress.results["committed"] == 1)

        async def all_is_acked() -> bool:
            return await queue.unacked() == 0

        await wait_until(all_is_acked)


async def test_a_permission_that_is_missing_is_named(
    guarded_nats: Callable[[str], Daemon],
) -> None:
    """The error says what the server refused, instead of a time-out."""
    server = await asyncio.to_thread(guarded_nats, "CONSUMER.INFO")
    async with guarded(server) as (_, source):
        with pytest.raises(TransportError, match=r"(?i)permissions violation.*CONSUMER\.INFO"):
            await source.fetch(1)


@pytest.mark.parametrize(
    "headers",
    [
        {"Nats-Expected-Stream": "this"},
        {"nats-expected-stream": "this"},
        {"Nats-Rollup": "sub"},
        {"Nats-Expected-Last-Subject-Sequence": "0"},
        {"Large": "x" * 60_000},
        {"Status": "503"},
        {"Status": "404", "Description": "No Messages"},
        {"Status": "100"},
    ],
    ids=lambda headers: next(iter(headers)),
)
async def test_headers_of_the_publisher_do_not_hold_up_a_burial(
    nats_queue: NatsQueue, headers: dict[str, str]
) -> None:
    """What controls the server is not copied to a dead letter, which is buried once."""
    jetstream, stream = nats_queue._jetstream, nats_queue.stream
    subjects = [nats_queue.subject.replace("paid", "*")]
    await jetstream.update_stream(
        StreamConfig(name=stream, subjects=subjects, allow_rollup_hdrs=True)
    )
    headers = {name: stream if value == "this" else value for name, value in headers.items()}
    async with reading(await nats_queue.source(), Sender()) as ingress:
        await jetstream.publish(nats_queue.subject, b"no JSON", headers={"Kept": "yes", **headers})
        await buried(nats_queue, 1)
        await nats_queue.publish(order())
        await wait_until(lambda: ingress.results["committed"] == 1)
        await wait_until(lambda: ingress.results["refused"] == 1)
        assert not ingress.is_down


@pytest.mark.parametrize(
    ("subject", "header"),
    [
        (b"\xff\xfe", b""),
        (b"a\x0bb", b""),
        (b"a\x0c1", b""),
        (
            b"x",
            b"NATS/1.0\r\n\xff: 1\r\na b: 2\r\na(b): 3\r\n: 4\r\nno colon\r\nKept: \xff\r\n\r\n",
        ),
        (b"x", b"NATS/1.0 503\r\n\r\n"),
        (b"x", b"NATS/1.0 404 No Messages\r\n\r\n"),
        (b"x", b"NATS/1.0 100 Idle Heartbeat\r\n\r\n"),
        (b"x", b"NATS/1.0 \xff\r\n\r\n"),
        (b"x", b"NATS/1.0"),
        (b"x", b"x"),
    ],
)
async def test_odd_subjects_and_headers_hold_nobody_up(
    nats_server: Daemon, nats_queue: NatsQueue, subject: bytes, header: bytes
) -> None:
    """The server accepts them: what they belong to is committed, or buried once if it is poison."""
    prefix = nats_queue.subject.removesuffix("paid").encode()
    source = NatsSource(f"{nats_server.url}/{nats_queue.stream}", cluster=nats_queue.cluster)
    try:
        async with reading(source, Sender()) as ingress:
            for body in (order(), b"no JSON"):
                publish_raw(nats_server, prefix + subject, header, body)
            await nats_queue.publish(order())
            await wait_until(lambda: ingress.results["committed"] == 2)
            [letter] = await buried(nats_queue, 1)
            assert letter.body == b"no JSON"
            await wait_until(lambda: ingress.results["refused"] == 1)  # counted once it is buried
            assert not ingress.is_down
    finally:
        await source.close()


def publish_raw(server: Daemon, subject: bytes, header: bytes, body: bytes) -> None:
    """Publish as no client would."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        sizes = b"%d %d" % (len(header), len(header) + len(body))
        command = (
            b"HPUB %b %b" % (subject, sizes) if header else b"PUB %b %d" % (subject, len(body))
        )
        raw.sendall(b'CONNECT {"headers":true}\r\n%b\r\n%b%b\r\nPING\r\n' % (command, header, body))
        answer = b""
        while not answer.endswith(b"PONG\r\n"):
            answer += raw.recv(4096)
        assert b"-ERR" not in answer


async def test_a_dead_letter_that_is_not_accepted_holds_nobody_up(
    nats_queue: NatsQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are buried and committed meanwhile, and it is itself once there is room for it."""
    monkeypatch.setattr(ingress_module, "RETRY_DELAY_S", 0.0)
    jetstream, name = nats_queue._jetstream, f"pokebridge-{nats_queue.cluster}-dead-letters"
    subjects = [f"pokebridge.{nats_queue.cluster}.dead-letters"]
    await jetstream.add_stream(StreamConfig(name=name, subjects=subjects, max_msg_size=1000))
    async with reading(await nats_queue.source(), Sender()) as ingress:
        await nats_queue.publish(b"large" * 1000, *(b"no JSON %d" % n for n in range(20)), order())
        assert len(await buried(nats_queue, 20)) == 20
        await wait_until(lambda: ingress.results["committed"] == 1)
        await wait_until(lambda: ingress.is_down)
        await jetstream.update_stream(StreamConfig(name=name, subjects=subjects))
        [letter] = await buried(nats_queue, 1)
        assert letter.body == b"large" * 1000


async def test_an_outage_that_nobody_foresaw_buries_nothing(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the driver words it: while nothing can be committed, all messages wait."""
    monkeypatch.setattr(ingress_module, "RETRY_DELAY_S", 0.0)
    sender = Sender()
    sender.defect_in = "order-7"
    async with reading(await queue.source(), sender) as ingress:
        await queue.publish(order(id="order-7"))
        await wait_until(lambda: ingress.results["retried"] > 2 * ingress_module.MAX_DEFECTS)
        sender.defect_in = ""
        await wait_until(lambda: ingress.results["committed"] == 1)
    assert await queue.dead_letters() == []


REFUSALS = {
    "no login": ("ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN"),
    "no room for connections": (
        "ALTER ROLE {role} CONNECTION LIMIT 0",
        "ALTER ROLE {role} CONNECTION LIMIT -1",
    ),
    "read-only": (
        "ALTER ROLE {role} SET default_transaction_read_only = on",
        "ALTER ROLE {role} RESET default_transaction_read_only",
    ),
    "no privilege": ("REVOKE INSERT ON messages FROM {role}", "GRANT INSERT ON messages TO {role}"),
    "no table": ("ALTER TABLE receipts RENAME TO away", "ALTER TABLE away RENAME TO receipts"),
    "no function": (
        "ALTER FUNCTION append_above_heads RENAME TO away",
        "ALTER FUNCTION away RENAME TO append_above_heads",
    ),
} | {
    f"error {state}": (
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE 'not now' USING ERRCODE = '{state}'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON messages EXECUTE FUNCTION refuse();
        GRANT ALL ON FUNCTION refuse() TO PUBLIC""",
        "DROP FUNCTION refuse CASCADE",
    )
    # A full disk, a stop, a lock, a defect of the server, and errors of triggers and casts.
    for state in ("53100", "57P01", "55P03", "XX000", "P0001", "22P02")
}


@pytest.mark.parametrize(("refuse", "permit"), REFUSALS.values(), ids=REFUSALS)
async def test_a_database_that_refuses_is_waited_out(
    nats_queue: NatsQueue,
    postgres_database: str,
    monkeypatch: pytest.MonkeyPatch,
    refuse: str,
    permit: str,
) -> None:
    """However PostgreSQL words it, nothing is lost or buried, and it recovers by itself."""
    monkeypatch.setattr(ingress_module, "RETRY_DELAY_S", 0.0)
    monkeypatch.setattr(postgres_pool, "CALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(postgres, "TURN_TIMEOUT_S", 0.5)
    role = f"role_{secrets.token_hex(8)}"
    by_hand = await asyncpg.connect(postgres_database)
    await by_hand.execute(f"CREATE ROLE {role} LOGIN")
    await by_hand.execute(f"CREATE SCHEMA {role} AUTHORIZATION {role}")
    url = postgres_database.replace("postgres@", f"{role}@")
    mailbox = await PostgresMailbox.open(f"{url}?schema={role}")
    await by_hand.execute(f"SET search_path = {role}")
    ingress = Ingress(await nats_queue.source(), read_queued, mailbox.append)
    await ingress.start()
    await by_hand.execute(refuse.format(role=role))
    await by_hand.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", role
    )
    await nats_queue.publish(*(order(body=n) for n in range(5)))
    await wait_until(lambda: ingress.results["retried"] > 5 * ingress_module.MAX_DEFECTS)
    await by_hand.execute(permit.format(role=role))
    # A commit whose answer came too late is a duplicate at the next attempt.
    await wait_until(lambda: ingress.results["committed"] + ingress.results["duplicate"] == 5)
    assert len(await versions(mailbox)) == 5
    assert await nats_queue.dead_letters() == []
    await ingress.close()
    await mailbox.close()
    await by_hand.close()
