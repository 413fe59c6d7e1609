"""The sessions of workers, as their hub's gateway routes, limits and ends them."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from pokebridge.gateway.audiences import LARGE
from pokebridge.gateway.shard_routing import Reach
from pokebridge.gateway.subscriptions import SubscriptionTiming
from pokebridge.model import Ack, Poke
from pokebridge.placement import ShardMap
from pokebridge.session import State, Timing
from pokebridge.wire import Disconnect, poke_frame
from pokebridge.workers import frames, worker_gateway
from pokebridge.workers.worker_gateway import ANSWER_WITHIN_S
from tests.gateway.harness import BOB, token
from tests.support.waiting import wait_until
from tests.workers.host import running_host

EVE = "urn:user:eve"
DOC = "urn:doc:7"


async def test_a_poke_reaches_all_sessions_of_its_recipient_and_no_other() -> None:
    """On whichever worker they are; several on one worker are poked once each."""
    async with running_host() as host:
        bobs = [await host.open(worker) for worker in (0, 0, 1)]
        eve = await host.open(1, EVE)
        await host.publisher.publish([Poke(BOB, 7)])
        await host.publisher.publish([Poke(EVE, 1)])
        for bob in bobs:
            assert await bob.message() == {"type": "poke", "version": 7}
        assert await eve.message() == {"type": "poke", "version": 1}
        await host.publisher.publish([Poke(BOB, 8)])
        for bob in bobs:
            assert await bob.message() == {"type": "poke", "version": 8}


async def test_a_foreign_poke_reaches_no_worker() -> None:
    """It costs the hub one look-up, whatever the number of workers."""
    async with running_host() as host:
        bob = await host.open(0)
        sent: list[frames.Message] = []
        for link in host.links:
            link.send = sent.append  # type: ignore[assignment] # it appends
        await host.publisher.publish([Poke(EVE, 1)])
        assert host.gateway.bridge.counters.noise == 1
        assert sent == []
        await bob.close()


async def test_a_poke_of_this_host_does_not_wait_for_the_engine() -> None:
    """It is heard while the engine delivers nothing, and once only when it does."""
    async with running_host() as host:
        bob = await host.open(1)
        await host.publisher.publish([Poke(BOB, 1)])
        assert await bob.message() == {"type": "poke", "version": 1}
        host.transport.deaf = True
        await host.publisher.publish([Poke(BOB, 2)])
        assert await bob.message() == {"type": "poke", "version": 2}
        assert host.gateway.bridge.counters.delivered == 2
        assert host.gateway.bridge.counters.merged == 1


async def test_ready_waits_until_the_hub_hears() -> None:
    """A worker accepts the handshake at once, and says ready when the subscription is proven."""
    timing = SubscriptionTiming(silence_s=0.2, probe_timeout_s=0.2, retry_s=0.05)
    async with running_host(subscription_timing=timing) as host:
        host.transport.deaf = True
        await wait_until(lambda: host.gateway.subscriptions.trouble is not None)
        client = await host.connect(0)
        assert client.status == 101
        (session,) = host.gateway.sessions
        assert not session.is_open
        host.transport.deaf = False
        assert (await client.message())["type"] == "ready"


async def test_a_gap_pokes_the_sessions_of_all_workers() -> None:
    """The hub may have missed pokes, so every client pulls."""
    async with running_host() as host:
        clients = [await host.open(0), await host.open(1, EVE)]
        host.gateway.bridge.wake(lambda _: True, pulls_per_s=1000)
        for client in clients:
            assert (await client.message())["type"] == "poke"


async def test_limits_count_for_the_host() -> None:
    """The third session of two is refused, on whichever worker, and again possible afterwards."""
    async with running_host(max_sessions=2) as host:
        first = await host.open(0)
        await host.open(1)
        refused = await host.connect(0)
        assert refused.status == 503
        assert "Retry-After".lower() in refused.headers
        assert host.workers[0].gateway.entrance.handshakes == {"101": 1, "503": 1}
        await first.close()
        await wait_until(lambda: len(host.gateway.sessions) == 1)
        await host.open(1)


async def test_the_limit_of_a_recipient_counts_for_the_host() -> None:
    """One session too many closes the oldest, on another worker too."""
    async with running_host(max_sessions_per_recipient=2) as host:
        oldest = await host.open(0)
        others = [await host.open(1), await host.open(1)]
        assert await oldest.closed() == 4409
        await host.publisher.publish([Poke(BOB, 1)])
        for other in others:
            assert (await other.message())["type"] == "poke"


async def test_the_limit_of_an_address_and_the_pace_count_for_the_host() -> None:
    """429 for an address with too many sessions, 503 for too many handshakes a second."""
    async with running_host(max_sessions_per_address=2) as host:
        await host.open(0)
        await host.open(1)
        assert (await host.connect(0)).status == 429
    async with running_host(handshakes_per_s=2) as host:
        statuses = {(await host.connect(n % 2)).status for n in range(12)}
        assert statuses == {101, 503}


async def test_a_disconnect_closes_the_sessions_on_all_workers() -> None:
    """With 4401; other recipients' stay."""
    async with running_host() as host:
        bobs, eve = [await host.open(0), await host.open(1)], await host.open(0, EVE)
        host.gateway.bridge.disconnect(Disconnect(BOB))
        for bob in bobs:
            assert await bob.closed() == 4401
        await host.publisher.publish([Poke(EVE)])
        assert (await eve.message())["type"] == "poke"


async def test_a_revoked_token_is_refused_by_a_worker() -> None:
    """A worker refuses the token as soon as it has received the revocation."""
    async with running_host() as host:
        gateway = host.workers[0].gateway
        now_ms = int(time.time() * 1000)
        gateway.take(frames.Revoke(Disconnect(BOB, now_ms, now_ms + 60_000)))
        assert gateway.disconnects.refuses(BOB, now_ms / 1000 - 5, time.time())
        assert not gateway.disconnects.refuses(EVE, now_ms / 1000 - 5, time.time())


async def test_sessions_follow_their_shard() -> None:
    """A client of a shard that another instance owns is sent there, and one that was sent stays."""
    async with running_host() as host:
        before = await host.open(0)
        owners = tuple("i-2" for _ in range(100))
        members = {"i-2": Reach("wss://two/v1/connect", "x"), "i-1": Reach("wss://one", "y")}
        host.gateway.shard_routing.see(ShardMap(1, "partitioned", owners), members)
        led = await host.connect(1)
        assert led.status == 101
        assert await led.message() == {"type": "move", "url": "wss://two/v1/connect"}
        assert await led.closed() == 4307
        await host.open(1, path="/v1/connect?moved=1")
        assert len(host.gateway.sessions) == 2
        await before.close()


async def test_acks_reach_the_hub() -> None:
    """They are recorded with the recipient and the device of their session."""
    recorded: list[Ack] = []

    async def record(acks: Sequence[Ack]) -> None:
        recorded.extend(acks)

    async with running_host(record_acks=record) as host:
        client = await host.open(1, path="/v1/connect?device=phone")
        client.say({"type": "ack", "version": 3})
        await wait_until(lambda: bool(recorded))
        assert recorded == [Ack(BOB, "phone", 3)]


async def test_acks_go_with_what_is_sent_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acks are sent with the next frame, or after a short time."""
    monkeypatch.setattr(worker_gateway, "ACKS_WITHIN_S", 3600.0)
    recorded: list[Ack] = []

    async def record(acks: Sequence[Ack]) -> None:
        recorded.extend(acks)

    async with running_host(record_acks=record) as host:
        client = await host.open(0)
        for version in (3, 4):
            client.say({"type": "ack", "version": version})
        await wait_until(lambda: len(host.workers[0].gateway._acks) == 2)
        assert not recorded
        await host.open(0)
        await wait_until(lambda: bool(recorded))
        assert recorded == [Ack(BOB, "default", 4)]


async def test_a_dead_worker_takes_its_own_sessions_alone() -> None:
    """The hub forgets its sessions, and those of the others go on."""
    async with running_host() as host:
        await host.open(0)
        other = await host.open(1)
        host.workers[0].channel.close()
        await wait_until(lambda: len(host.gateway.sessions) == 1)
        assert host.gateway.entrance.sessions == 1
        await host.publisher.publish([Poke(BOB, 2)])
        assert await other.message() == {"type": "poke", "version": 2}


async def test_a_client_that_leaves_is_forgotten_whenever_it_does() -> None:
    """Also before the hub has answered. Then its number is given to the next one."""
    async with running_host() as host:
        for _ in range(20):
            client = await host.open(0)
            hasty = await host.connect(0)
            hasty.writer.transport.abort()
            client.writer.transport.abort()
        await wait_until(lambda: not len(host.gateway.sessions))
        assert host.gateway.entrance.sessions == 0
        assert host.links[0].sessions == 0
        worker = host.workers[0].gateway
        assert not worker.sessions
        assert not worker._unanswered
        await wait_until(lambda: len(worker._free) == len(worker._by_number) <= 4)


async def test_a_number_is_free_only_when_the_hub_has_forgotten_its_session() -> None:
    """What the hub says of a session that has ended meanwhile is not taken for the next one's.

    It opens the first session, which has waited for its subscription, when its client has gone.
    """
    async with running_host() as host:
        worker, link = host.workers[0].gateway, host.links[0]
        held: list[frames.ToHub] = []
        first = await host.open(0)
        take, link.channel._on_message = link.channel._on_message, held.append
        await first.close()
        await wait_until(lambda: frames.Leave(0) in held)
        second = asyncio.ensure_future(host.open(0))
        await wait_until(lambda: len(held) == 2)
        worker.take(frames.Open(0))
        (connection,) = worker.numbered()
        assert worker._by_number == [None, connection]
        assert connection.session.state is State.WAITING
        link.channel._on_message = take
        for message in held:
            take(message)
        await second
        await wait_until(lambda: worker._free == [0])


async def test_a_handshake_that_the_hub_does_not_answer_is_refused() -> None:
    """With 503 and after a time; an answer that comes later does no harm."""
    async with running_host() as host:
        worker, link = host.workers[0].gateway, host.links[0]
        held: list[frames.ToHub] = []
        take, link.channel._on_message = link.channel._on_message, held.append
        dialled = asyncio.ensure_future(host.connect(0))
        await wait_until(lambda: bool(held))
        worker.refuse_overdue(time.time() + ANSWER_WITHIN_S - 1.1)
        assert not dialled.done()
        worker.refuse_overdue(time.time() + ANSWER_WITHIN_S + 1)
        assert (await dialled).status == 503
        assert worker.entrance.handshakes == {"101": 0, "503": 1}
        link.channel._on_message = take
        for message in held:
            take(message)
        await wait_until(lambda: link.sessions == 0 and worker._free == [0])
        await host.open(0)


async def test_a_worker_that_reads_slowly_is_poked_when_it_has_caught_up() -> None:
    """Pokes beyond the bound are dropped, and then every session of that worker is poked."""
    async with running_host() as host:
        client, link = await host.open(0), host.links[0]
        link.channel.is_congested = True
        await host.publisher.publish([Poke(BOB, 5)])
        assert host.gateway.bridge.counters.delivered == 0
        link.channel.resume_writing()
        assert await client.message() == {"type": "poke", "within_ms": 1}
        await host.publisher.publish([Poke(BOB, 6)])
        assert await client.message() == {"type": "poke", "version": 6}


async def test_a_drain_closes_the_sessions_of_all_workers() -> None:
    """All sessions close with 1012, and new ones are refused. It returns when all have ended."""
    async with running_host() as host:
        clients = [await host.open(0), await host.open(1, EVE)]
        draining = asyncio.ensure_future(host.gateway.drain(0.1))
        for client in clients:
            assert await client.closed() == 1012
        await draining
        assert not len(host.gateway.sessions)
        assert (await host.connect(0)).status == 503


async def test_each_session_of_a_group_is_poked_once_on_its_worker() -> None:
    """Each session is poked once, whatever the number. A single session can be poked, too."""
    async with running_host(group_prefixes=("urn:group:",), audience_pulls_per_s=1e5) as host:
        room = "urn:group:room"
        clients = [await host.open(number % 2, room) for number in range(LARGE + 10)]
        await host.publisher.publish([Poke(room, 1)])
        for client in clients:
            assert await client.message() == {"type": "poke", "version": 1, "within_ms": 1}
        alone = list(host.gateway.sessions.find(room))[-1]
        alone.notify(2, poke_frame(2))
        assert await clients[-1].message() == {"type": "poke", "version": 2}
        for client in clients[:4]:
            await client.close()
        await wait_until(lambda: len(host.gateway.sessions) == LARGE + 6)
        late = await host.open(0, room)
        await wait_until(lambda: not host.gateway.bridge.audiences.was_poked(room))
        await host.publisher.publish([Poke(room, 3)])
        for client in (*clients[4:], late):
            assert (await client.message())["version"] == 3


async def test_a_session_of_a_worker_listens_to_more() -> None:
    """The hub learns what a session listens to, confirms it when live, and can end it alone."""
    listens = Timing(max_listened=2)
    async with running_host(timing=listens, mode="partitioned") as host:
        bob, eve = await host.open(0), await host.open(1, EVE)
        for client in (bob, eve):
            client.say({"type": "listen", "recipient": DOC, "token": token(DOC)})
            assert (await client.message())["type"] == "listening"
        assert (len(host.gateway.sessions), host.gateway.sessions.listened) == (2, 2)
        assert host.gateway.entrance.sessions == 2
        await host.publisher.publish([Poke(DOC, 7)])
        for client in (bob, eve):
            assert await client.message() == {"type": "poke", "recipient": DOC, "version": 7}
        bob.say({"type": "unlisten", "recipient": DOC})
        await wait_until(lambda: host.gateway.sessions.listened == 1)
        await host.publisher.publish([Poke(DOC, 8)])
        assert (await eve.message())["version"] == 8
        host.gateway.bridge.disconnect(Disconnect(DOC))
        assert (await eve.message())["type"] == "unlistened"
        await wait_until(lambda: not host.gateway.sessions.listened)
        for client, recipient in ((bob, BOB), (eve, EVE)):
            await host.publisher.publish([Poke(recipient, 1)])
            assert await client.message() == {"type": "poke", "version": 1}


async def test_listening_waits_until_the_hub_hears() -> None:
    """As ``ready`` does; a client that leaves meanwhile leaves nothing behind."""
    async with running_host(timing=Timing(max_listened=2), mode="partitioned") as host:
        bob, eve = await host.open(0), await host.open(1, EVE)
        host.transport.deaf = True
        for client in (bob, eve):
            client.say({"type": "listen", "recipient": DOC, "token": token(DOC)})
        await wait_until(lambda: host.gateway.sessions.listened == 2)
        await eve.close()
        await wait_until(lambda: host.gateway.sessions.listened == 1)
        host.transport.deaf = False
        assert (await bob.message())["type"] == "listening"
        await bob.close()
        await wait_until(lambda: not host.gateway.sessions.recipients)
        assert not host.gateway.shard_routing.interest


async def test_a_dead_worker_takes_what_its_sessions_listened_to() -> None:
    """Nothing of it is left at the hub."""
    async with running_host(timing=Timing(max_listened=2)) as host:
        bob = await host.open(0)
        bob.say({"type": "listen", "token": token(DOC)})
        assert (await bob.message())["type"] == "listening"
        host.workers[0].channel.close()
        await wait_until(lambda: not host.gateway.sessions.recipients)
        assert host.links[0].sessions == 0
