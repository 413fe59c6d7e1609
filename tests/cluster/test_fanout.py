"""Three real instances that share a mailbox, on each engine: fan-out, and what may break."""

import asyncio
import contextlib
import json
import secrets
import zlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from time import monotonic

import httpx
import pytest
from google.pubsub_v1 import SubscriberClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from grpc import insecure_channel

from pokebridge.telemetry import Metric
from tests.cluster.clusters import NAMES, Cluster, Clusters, clusters, metrics, on_each, until_quiet
from tests.cluster.publishers import PUBLISHERS, HandMade
from tests.cluster.traffic import Traffic, frames, session
from tests.cluster.traffic import clients as clients_of
from tests.support import wait_until
from tests.support.missing import missing
from tests.support.silence import Silence

__all__ = ["clusters"]

TIMEOUT_S = 200.0
# How long a message may wait for a client once all is well again: 5 s, and four times that on a
# machine that runs other tests too (`make chaos` holds the limits themselves).
SILENCE_LIMIT_S = 4 * 5.0
CUT_S = 10.0
# The answer of /readyz while the engine is away.
REASONS = {
    "nats": "nats://127.0.0.1:",
    "valkey": "redis://127.0.0.1:",
    "pubsub": "Pub/Sub at 127.0.0.1:",
}
OUTBOX_SWEEP_S = 1.0


def people(*names: str) -> list[str]:
    """Recipients that no other test knows."""
    return [f"urn:user:{name}-{secrets.token_hex(4)}" for name in names]


def report(capsys: pytest.CaptureFixture[str], act: str, lines: Sequence[str]) -> None:
    """Print what was measured: the bound is a result."""
    with capsys.disabled():
        print(f"\n{act}:", *lines, sep="\n  ")  # noqa: T201 - on purpose, see above


async def test_a_poke_reaches_the_recipients_sessions_and_no_other(clusters: Clusters) -> None:
    """Every instance hears it; those that hold the recipient pass it on, for the third it is noise.

    It is published at the one that has no session for it.
    """

    async def act(cluster: Cluster) -> str:
        one, two, three = cluster.instances
        alice, bob, carol = people("alice", "bob", "carol")
        wanted = (Metric.POKES, Metric.POKES_NOISE, Metric.POKES_DELIVERED)
        async with (
            session(one, alice) as first,
            session(two, alice) as second,
            session(two, bob) as neighbour,
            session(three, carol) as other,
            three.async_http("urn:backend", "poke") as http,
        ):
            await until_quiet(cluster, 1.2 * OUTBOX_SWEEP_S)  # other tests' pokes count as well
            before = await cluster.counts(*wanted)
            answer = await http.post("/v1/pokes", json={"recipient": alice})
            assert answer.status_code == 202

            async def counted() -> list[list[float]]:
                after = await cluster.counts(*wanted)
                return [
                    [b - a for a, b in zip(*both, strict=True)]
                    for both in zip(before, after, strict=True)
                ]

            async def heard_by_all() -> bool:
                return all(pokes for pokes, _, _ in await counted())

            await wait_until(heard_by_all, what="every instance having the poke")
            assert await frames(first) == [{"type": "poke"}]
            assert await frames(second) == [{"type": "poke"}]
            assert await frames(neighbour) == []
            assert await frames(other) == []
            assert await counted() == [[1, 0, 1], [1, 0, 1], [1, 1, 0]]
        return "on two, and noise on the third"

    await on_each(clusters, act, TIMEOUT_S)


async def test_signals_that_others_publish_are_understood(clusters: Clusters) -> None:
    """Single or batched, with or without a shard. Garbage is counted and dropped."""

    async def act(cluster: Cluster) -> str:
        instance = cluster.instances[1]
        for publish in PUBLISHERS[cluster.name]:
            pokes, recipients = hand_made()
            async with AsyncExitStack() as stack:
                sessions = [
                    await stack.enter_async_context(session(instance, recipient))
                    for recipient in recipients
                ]
                (malformed,) = await metrics(instance, Metric.SIGNALS_MALFORMED)
                await publish(cluster, [*GARBAGE, *pokes])
                # On a busy machine a gap may poke all sessions first, and names no version.
                for socket, version in zip(sessions, recipients.values(), strict=True):
                    while json.loads(await socket.recv()).get("version") != version:
                        pass

            async def is_counted(enough: float = malformed + len(GARBAGE)) -> bool:
                return (await metrics(instance, Metric.SIGNALS_MALFORMED))[0] >= enough

            await wait_until(is_counted, what=f"all garbage counted, of {publish.__name__}")
        return "understood"

    await on_each(clusters, act, TIMEOUT_S)


def hand_made() -> tuple[list[HandMade], dict[str, int | None]]:
    """Signals in every form of the protocol, and the version that each recipient is to hear."""
    one, two, three, four, five, six, seven = people("1", "2", "3", "4", "5", "6", "7")

    def tagged(body: str, recipient: str) -> HandMade:
        return HandMade(body, zlib.crc32(recipient.encode()) % 100)

    signals = [
        HandMade(f'{{"recipient":"{one}"}}'),
        tagged(f'{{"recipient": "{two}", "version": 17}}', two),
        HandMade(f'{{"type":"poke","recipient":"{three}","more":[1]}}'),
        HandMade(f'{{"pokes":[{{"recipient":"{four}","version":4}},{{"recipient":"{five}"}}]}}'),
        tagged(f'{{"pokes":[{{"recipient":"{six}","version":6}}]}}', six),
        tagged(f'{{"type":"poke","recipient":"{seven}","version":1}}', seven),
    ]
    versions = {one: None, two: 17, three: None, four: 4, five: None, six: 6, seven: 1}
    return signals, versions


GARBAGE = [
    HandMade("hello"),
    HandMade("[]"),
    HandMade('{"recipient":7}', 42),
    HandMade('{"recipient":"urn:user:ann","version":-1}'),
    HandMade('{"type":"reboot","recipient":"urn:user:ann"}'),
    HandMade('{"pokes":{}}', 7),
    HandMade('{"recipient":"urn:user:ann"', 1),
]


async def test_poison_in_a_row_ends_no_reader(clusters: Clusters, silence: Silence) -> None:
    """64 signals with a non-ASCII recipient at once are counted, and the next one is handled."""

    async def act(cluster: Cluster) -> str:
        instance, publish = cluster.instances[1], PUBLISHERS[cluster.name][-1]
        [alice] = people("alice")
        async with session(instance, alice) as socket:
            logged = len(instance.log())
            [malformed] = await metrics(instance, Metric.SIGNALS_MALFORMED)
            heard = silence(
                f"64 signals that can't be decoded, and a poke behind them ({cluster.name})"
            )
            await publish(cluster, [HandMade('{"recipient":"urn:user:josé"}', 42)] * 64)
            await publish(cluster, [HandMade(f'{{"recipient":"{alice}","version":4711}}', 42)])
            while json.loads(await socket.recv()).get("version") != 4711:
                pass
            heard()

        async def is_counted() -> bool:
            return (await metrics(instance, Metric.SIGNALS_MALFORMED))[0] >= malformed + 64

        await wait_until(is_counted, what="all 64 counted")
        for event in ("task_failed", "transport_connection_lost", "pubsub_gap"):
            assert event not in instance.log()[logged:]
        return "counted"

    await on_each(clusters, act, TIMEOUT_S)


async def test_an_engine_that_is_restarted_leaves_nobody_silent(
    clusters: Clusters, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that was answered 202 is pulled by every client; soon, once the engine is back.

    Carol gets her only message while it is down, so no later one can wake her clients. Meanwhile
    ``/readyz`` says which engine is away, and it recovers by itself.
    """

    async def act(cluster: Cluster) -> str:
        traffic, (alice, bob, carol) = Traffic(), people("alice", "bob", "carol")
        async with (
            clients_of(cluster, traffic, (alice, bob, carol)),
            traffic.flowing(cluster.instances[0], (alice, bob)),
        ):
            await traffic.more(10)
            await asyncio.to_thread(cluster.engine.kill)
            await traffic.more(10)
            async with cluster.instances[1].async_http("urn:backend", "send") as other:
                await traffic.send(other, carol)
            await wait_until(partial(is_readiness, cluster, 503, REASONS[cluster.name]), 60)
            await asyncio.to_thread(cluster.engine.start)
            back_s = monotonic()
            await traffic.more(20)
            await traffic.all_pulled()
            await wait_until(partial(is_readiness, cluster, 200, ""), 60)
        return measured(traffic, back_s)

    report(capsys, "engine killed and restarted", await on_each(clusters, act, TIMEOUT_S))


async def is_readiness(cluster: Cluster, status: int, text: str) -> bool:
    """Whether that is what every instance's ``/readyz`` says."""
    answers = []
    for instance in cluster.instances:
        async with instance.async_http() as http:
            answers.append(await http.get("/readyz"))
    return all(answer.status_code == status and text in answer.text for answer in answers)


async def test_a_cut_connection_leaves_nobody_silent(
    clusters: Clusters, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two instances are cut off for 10 s, by a network that drops everything without a word.

    Messages are sent at one of these and at the third, which still speaks to the engine. Carol
    gets her only message meanwhile, at the third: the clients on the two others depend on the gap.
    """

    async def act(cluster: Cluster) -> str:
        traffic, (alice, bob, carol) = Traffic(), people("alice", "bob", "carol")
        one, _, three = cluster.instances
        async with (
            clients_of(cluster, traffic, (alice, bob, carol)),
            traffic.flowing(one, (alice,)),
            traffic.flowing(three, (bob,)),
            three.async_http("urn:backend", "send") as http,
        ):
            await traffic.more(10)
            for cable in cluster.cables[:2]:
                cable.cut()
            cut_s = monotonic()
            await traffic.more(10)
            await traffic.send(http, carol)
            await wait_until(lambda: monotonic() > cut_s + CUT_S, CUT_S + 5)  # the fault itself
            for cable in cluster.cables[:2]:
                cable.heal()
            back_s = monotonic()
            await traffic.more(20)
            await traffic.all_pulled()
        return measured(traffic, back_s)

    report(
        capsys, f"two of three cut off for {CUT_S:.0f} s", await on_each(clusters, act, TIMEOUT_S)
    )


async def test_deleted_subscriptions_leave_nobody_silent(
    clusters: Clusters, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Pub/Sub an administrator deletes the subscription of every instance under its stream.

    Carol's only message is sent right after, when nobody may be subscribed.
    """
    if "pubsub" not in clusters:
        missing("Google's Pub/Sub emulator (gcloud's pubsub-emulator)")

    async def act(cluster: Cluster) -> str:
        traffic, (alice, bob, carol) = Traffic(), people("alice", "bob", "carol")
        one, _, three = cluster.instances
        async with (
            clients_of(cluster, traffic, (alice, bob, carol)),
            traffic.flowing(one, (alice, bob)),
            three.async_http("urn:backend", "send") as http,
        ):
            await traffic.more(10)
            before = await cluster.counts(Metric.GAPS)
            await asyncio.to_thread(_delete_subscriptions, cluster)
            deleted_s = monotonic()
            await traffic.send(http, carol)
            await traffic.more(20)
            await traffic.all_pulled()
            await wait_until(partial(_all_had_a_gap, cluster, before))
        return measured(traffic, deleted_s)

    only = {"pubsub": clusters["pubsub"]}
    report(capsys, "subscriptions deleted", await on_each(only, act, TIMEOUT_S))


async def _all_had_a_gap(cluster: Cluster, before: list[list[float]]) -> bool:
    return all(
        now > then for now, then in zip(await cluster.counts(Metric.GAPS), before, strict=True)
    )


def _delete_subscriptions(cluster: Cluster) -> None:
    with insecure_channel(cluster.engine.address) as channel:
        client = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        for name in NAMES:
            path = f"projects/{cluster.project}/subscriptions/poke-sub-{name}"
            client.delete_subscription(subscription=path)


def measured(traffic: Traffic, back_s: float) -> str:
    """The longest silence since ``back_s``, which is within the limit."""
    late_s, silence_s = traffic.silence_s(back_s, back_s), traffic.silence_s(back_s)
    assert silence_s < SILENCE_LIMIT_S
    return (
        f"{len(traffic.sent_s)} messages; longest silence {silence_s:.2f} s; what was sent before"
        f" was pulled {late_s:.2f} s after"
    )


async def test_the_others_take_over_from_an_instance_that_is_killed(
    clusters: Clusters, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the dead one had answered 202 is poked by the others, and its client served by them.

    Nothing more is sent to Alice after the kill: her clients on the others hear only of what the
    dead one owed. Bob's client moves to another URL and is poked there.
    """

    async def act(cluster: Cluster) -> str:
        traffic, (alice, bob) = Traffic(), people("alice", "bob")
        survivor, second, victim = cluster.instances
        async with (
            clients_of(cluster, traffic, (alice, bob)) as entered,
            survivor.async_http("urn:backend", "send") as other,
        ):
            sending = asyncio.create_task(_send_until_dead(cluster, traffic, (alice, bob)))
            await traffic.more(20)
            killed_s = monotonic()
            await asyncio.to_thread(victim.kill)
            await sending
            await traffic.all_pulled(NAMES[:2])
            left_behind = {recipient: entered[recipient, "three"] for recipient in (alice, bob)}
            await wait_until(lambda: not any(client.connected for client in left_behind.values()))
            async with (
                traffic.client(second, alice, "three", left_behind[alice].cursor),
                traffic.client(second, bob, "three", left_behind[bob].cursor) as moved,
            ):
                await moved.wait_ready(60)
                moved_s = monotonic()
                await traffic.send(other, bob)
                await traffic.all_pulled()
            await asyncio.to_thread(victim.start)  # the next test expects three
        owed_s, silence_s = traffic.silence_s(killed_s, moved_s), traffic.silence_s(moved_s)
        assert max(owed_s, silence_s) < SILENCE_LIMIT_S
        return (
            f"{len(traffic.sent_s)} messages; what was owed was pulled {owed_s:.2f} s after the"
            f" kill; longest silence of the moved {silence_s:.2f} s"
        )

    report(capsys, "instance killed", await on_each(clusters, act, TIMEOUT_S))


async def _send_until_dead(cluster: Cluster, traffic: Traffic, recipients: Sequence[str]) -> None:
    async with cluster.instances[2].async_http("urn:backend", "send") as http:
        with contextlib.suppress(httpx.HTTPError):
            while True:
                for recipient in recipients:
                    await traffic.send(http, recipient)
