"""An instance's place in its cluster, over the in-process store and transport."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from pokebridge.cluster import node
from pokebridge.cluster.node import Cluster, ClusterConfig
from pokebridge.coordination.base import Coordination
from pokebridge.coordination.memory import MemoryCoordination
from pokebridge.coordination.static import Replicas, StaticCoordination
from pokebridge.durations import RequestDurations
from pokebridge.errors import ConflictError, NotFoundError
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.gateway import Gateway
from pokebridge.model import Feed, Mode
from pokebridge.red_line import MIGRATE_RULES, RED_LINE_OPS_PER_S
from pokebridge.sharding import shard_of
from pokebridge.tokens import TokenVerifier
from pokebridge.transport.base import Signal
from pokebridge.transport.memory import MemoryTransport
from tests.support import wait_until

SECRET = "0123456789abcdef" * 4
BOB = "urn:user:bob"
SHARDS = 12


@dataclass
class Node:
    """One instance without a server around it."""

    name: str
    cluster: Cluster
    gateway: Gateway
    drains: list[str] = field(default_factory=list)

    @property
    def owned(self) -> frozenset[int]:
        """What the map in force here gives it."""
        return self.cluster.view.shard_map.owned_by(self.name)


@dataclass
class Nodes:
    """Instances that share a store and a bus."""

    opened: AsyncExitStack
    store: MemoryCoordination = field(default_factory=MemoryCoordination)
    bus: MemoryTransport = field(default_factory=MemoryTransport)

    async def add(
        self,
        name: str,
        coordination: Coordination | None = None,
        *,
        has_peers: bool = False,
        mode: Mode = "fanout",
    ) -> Node:
        """Start one, with an end of the shared store unless another ``coordination`` is given."""
        url = f"ws://{name}.example"
        config = ClusterConfig(
            engine="memory",
            instance=name,
            cluster="default",
            weight=1.0,
            advertise_url=url,
            is_member=True,
            can_lead=True,
            by_ring=False,
            shard_count=SHARDS,
            mode=mode,
            lease_s=0.5,
            red_line_ops_per_s=RED_LINE_OPS_PER_S,
            migrates=False,
            migrate_rules=MIGRATE_RULES,
        )
        transport = self.bus.connect()
        gateway_config = GatewayConfig(
            instance=name,
            max_sessions_per_recipient=1,
            verify_every_s=60,
            shard_count=SHARDS,
            mode=mode,
        )
        gateway = Gateway(gateway_config, transport, TokenVerifier(secret=SECRET))
        drains: list[str] = []
        cluster = Cluster(
            config,
            gateway,
            coordination or self.store.connect(),
            RequestDurations(),
            url=url,
            has_peers=has_peers,
            on_drain=lambda: drains.append(name),
        )
        await gateway.start()
        self.opened.push_async_callback(gateway.close)
        await cluster.start()
        self.opened.push_async_callback(cluster.close)
        return Node(name, cluster, gateway, drains)


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    """Nobody yet."""
    async with AsyncExitStack() as opened:
        yield Nodes(opened)


def shares(*nodes: Node) -> Callable[[], bool]:
    """Whether ``nodes`` have all the shards, each its even part, and agree on that."""
    return lambda: all(
        len(node.owned) == SHARDS // len(nodes)
        and node.cluster.view.shard_map == nodes[0].cluster.view.shard_map
        for node in nodes
    )


async def test_a_migration_there_and_back(nodes: Nodes) -> None:
    """Each instance holds its shards once partitioned, and everything again in fan-out."""
    one, two = await nodes.add("one"), await nodes.add("two")
    await wait_until(shares(one, two), what="a balanced map")
    assert one.gateway.subscriptions.selections == {Feed.ALL}
    await two.cluster.migrate("partitioned", force=False)

    def holds_its_shards(node: Node) -> bool:
        subscriptions = node.gateway.subscriptions
        return subscriptions.settled and subscriptions.selections == node.owned | {Feed.UNTAGGED}

    await wait_until(
        lambda: holds_its_shards(one) and holds_its_shards(two),
        what="both instances holding their shards",
    )
    shown = one.cluster.status()
    assert shown.mode == "partitioned"
    assert sorted(shard for each in shown.instances for shard in each.shards) == list(range(SHARDS))
    await one.cluster.migrate("fanout", force=False)
    await wait_until(
        lambda: all(node.gateway.subscriptions.selections == {Feed.ALL} for node in (one, two)),
        what="fan-out again",
    )


async def test_leaving_fan_out_is_refused_while_traffic_is_untagged(nodes: Nodes) -> None:
    """The refusal says which share carries no shard; tagged traffic passes, and so does force."""
    one = await nodes.add("one")
    await nodes.bus.publish([Signal(b'{"recipient":"bob"}', shard_of("bob", SHARDS))] * 3)
    await nodes.bus.publish([Signal(b'{"recipient":"bob"}')])
    with pytest.raises(ConflictError, match="25% of the signals carry no valid shard"):
        await one.cluster.migrate("partitioned", force=False)
    await one.cluster.migrate("partitioned", force=True)
    assert one.cluster.view.shard_map.mode == "partitioned"


async def test_leaving_fan_out_is_refused_while_traffic_is_tagged_wrongly(nodes: Nodes) -> None:
    """A publisher with another shard count would wake nobody. A sample of signals shows it."""
    one = await nodes.add("one")
    wrong = (shard_of("bob", SHARDS) + 1) % SHARDS
    await nodes.bus.publish([Signal(b'{"recipient":"bob"}', wrong)] * 200)
    with pytest.raises(ConflictError, match="carry no valid shard"):
        await one.cluster.migrate("partitioned", force=False)


@pytest.mark.parametrize(
    ("coordination", "reason"),
    [
        (MemoryCoordination(), "share no coordination store"),
        (
            StaticCoordination(
                Replicas(0, 2, ""), instance="one", shard_count=SHARDS, mode="fanout"
            ),
            "each instance's setting",
        ),
    ],
)
async def test_a_migration_needs_a_store(
    nodes: Nodes, coordination: Coordination, reason: str
) -> None:
    """Where the instances can't agree on a mode, that is said, and nothing changes."""
    one = await nodes.add("one", coordination, has_peers=True)
    with pytest.raises(ConflictError, match=reason) as refused:
        await one.cluster.migrate("partitioned", force=False)
    assert refused.value.status == 409
    assert one.cluster.view.shard_map.mode == "fanout"


async def test_a_recipients_home_is_its_owner(nodes: Nodes) -> None:
    """Any instance names the owner in partitioned mode, and itself in fan-out mode."""
    one, two = await nodes.add("one"), await nodes.add("two")
    await wait_until(shares(one, two), what="a balanced map")
    shard = shard_of(BOB, SHARDS)
    assert one.cluster.home_of(BOB) == (shard, "one", "ws://one.example/v1/connect")
    await one.cluster.migrate("partitioned", force=False)
    await wait_until(
        lambda: two.cluster.view.shard_map.mode == "partitioned", what="two having heard"
    )
    owner = one if shard in one.owned else two
    home = (shard, owner.name, f"ws://{owner.name}.example/v1/connect")
    assert one.cluster.home_of(BOB) == two.cluster.home_of(BOB) == home


async def test_a_drain_hands_the_shards_over_first(nodes: Nodes) -> None:
    """When ``hand_over`` returns, others own the shards, and all members see the drain."""
    one, two = (
        await nodes.add("one", mode="partitioned"),
        await nodes.add("two", mode="partitioned"),
    )
    await wait_until(shares(one, two), what="a balanced map")
    one.gateway.refuse()
    await one.cluster.hand_over()
    assert not one.owned
    await wait_until(lambda: len(two.owned) == SHARDS, what="two having every shard")
    states = {each.member.id: each.state for each in two.cluster.status().instances}
    assert states == {"one": "draining", "two": "active"}


async def test_any_instance_can_be_asked_to_drain_any(nodes: Nodes) -> None:
    """The named instance starts to drain. An unknown name is refused."""
    one, two = await nodes.add("one"), await nodes.add("two")
    await wait_until(lambda: "two" in one.cluster.view.members, what="one seeing two")
    await one.cluster.drain("two")
    await wait_until(lambda: bool(two.drains), what="two beginning to drain")
    assert not one.drains
    await one.cluster.drain("one")
    assert one.drains
    with pytest.raises(NotFoundError, match="no such instance"):
        await one.cluster.drain("nobody")


async def test_a_restarted_instance_does_not_go_on_draining(nodes: Nodes) -> None:
    """The mark belonged to its earlier life."""
    one, two = await nodes.add("one"), await nodes.add("two")
    await wait_until(lambda: "two" in one.cluster.view.members, what="one seeing two")
    await one.cluster.drain("two")
    await wait_until(lambda: bool(two.drains), what="two beginning to drain")
    await two.cluster.close()
    again = await nodes.add("two")
    await wait_until(shares(one, again), what="its share of the shards")
    assert not again.drains


async def test_the_load_is_what_all_instances_receive(nodes: Nodes) -> None:
    """In fan-out each message counts once an instance, wherever one asks."""
    one, two = await nodes.add("one"), await nodes.add("two")
    await wait_until(lambda: "two" in one.cluster.view.members, what="one seeing two")
    await nodes.bus.publish([Signal(b'{"recipient":"bob"}', 3)] * 1000)
    load = two.cluster.status().load
    assert load.messages_per_s > 50
    assert load.ops_per_s == pytest.approx(2 * load.messages_per_s)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (
            "nats://a:1: nats://a:1: [Errno 111] Connection refused",
            "nats://a:1: Connection refused",
        ),
        (
            "redis://a:1: Multiple exceptions: [Errno 111] Connect call failed ('::1', 1),"  # noqa: ISC004
            " [Errno 111] Connect call failed ('127.0.0.1', 1)",
            "redis://a:1: Connection refused",
        ),
        ("the subscription did not deliver a probe in time",) * 2,
    ],
    ids=["twice", "addresses", "plain"],
)
def test_what_is_wrong_is_said_in_words(reason: str, words: str) -> None:
    """No number of an error, and no address twice, reaches the console."""
    assert node._in_words(reason) == words
