"""What each way of routing signals costs, for ``pokebridge plan`` (docs/redline.md).

Seven figures for each :class:`Strategy` from one :class:`Workload`. docs/redline.md reproduces them
by hand, and names the source of each price and each measured cost. An uncertain figure is a
:class:`Range`, which is carried through to the result.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Self

from pokebridge.model import Mode
from pokebridge.red_line import MIGRATE_RULES, RED_LINE_OPS_PER_S

Engine = Literal["pubsub", "nats", "redis"]

SECONDS_A_MONTH = 730 * 3600  # 365 days / 12, as cloud prices count
LEAST_SHARE = 0.0001  # what is less is shown as less than this
NEAR_SHARE = 0.8
"""From this share of the line on it is time to get ready."""


@dataclass(frozen=True, slots=True)
class Range:
    """A figure that is known to lie between two others, or exactly when they are equal."""

    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Self:
        """A figure that is known."""
        return cls(value, value)


# --- data, with sources -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prices:
    """What the engines cost, in US dollars; Google's prices are the same in all regions.

    Google: cloud.google.com/pubsub/pricing. A message's volume is its body, its attributes' names
    and values, 20 bytes for a timestamp and its id. Publishing and delivering are charged alike.
    A message that a filter drops is charged as delivered (cloud.google.com/pubsub/docs/filtering).
    """

    as_of: str = "2026-09-20"
    """When they were read."""
    usd_per_tib: float = 40.0
    free_bytes_a_month: float = 10 * 2**30
    min_request_bytes: float = 1000.0
    """Charged for a publish request or a pull response that holds less."""
    message_overhead_bytes: float = 7 + 20 + 16
    """Attribute ``shard`` with two digits, timestamp, id of 16 digits."""
    servers_usd_a_month: Range = Range(0.0, 3 * 0.067006 * 730)
    """NATS or Redis: from servers that run anyway to three of type e2-standard-2 (us-central1, list
    price)."""


@dataclass(frozen=True, slots=True)
class BatchCost:
    """CPU time an item when items are handled in batches, in µs, from two measured points.

    A batch costs something and each item costs something, so an item in a batch of ``size``
    costs ``item + batch / size``.
    """

    alone_us: float
    batched_us: float
    batch_size: int

    def at(self, size: float) -> float:
        """An item's share in a batch of ``size``."""
        batch_us = (self.alone_us - self.batched_us) / (1 - 1 / self.batch_size)
        return self.alone_us - batch_us + batch_us / size


@dataclass(frozen=True, slots=True)
class CpuCosts:
    """CPU time of a message that an instance receives and drops, as measured on two shared cores.

    ``poke``: decoding, looking up and dropping a poke, by the pokes of its message
    (docs/benchmarks.md). ``pubsub_receive``: by the messages of a response
    (docs/transports/google-pubsub.md). ``nats_receive_us`` and ``redis_receive_us``: at 30,000 and
    at 5,000 messages a second (docs/transports/nats.md, docs/transports/redis.md).
    """

    poke: BatchCost = BatchCost(alone_us=1.153, batched_us=0.555, batch_size=100)
    pubsub_receive: BatchCost = BatchCost(alone_us=130.0, batched_us=2.5, batch_size=200)
    nats_receive_us: Range = Range(3.5, 5.0)
    redis_receive_us: Range = Range(16.0, 22.0)


PRICES = Prices()
CPU_COSTS = CpuCosts()

# Google: cloud.google.com/pubsub/quotas, of a topic and of a project alike.
MAX_SUBSCRIPTIONS = MAX_TOPICS = 10_000
MAX_ADMIN_OPS_PER_MIN = 6000
MAX_FILTER_BYTES = 256
# Each instance counts the subscriptions every 30 s, 1,000 a call.
LISTINGS_PER_MIN = 2
SUBSCRIPTIONS_PER_LISTING = 1000
# `hasPrefix(attributes.shard,"42")` takes 33 bytes, " OR " takes 4, `NOT attributes:shard` 20.
PREFIXES_PER_FILTER = (MAX_FILTER_BYTES - 20) // (33 + 4)
WIDEN_AT = 0.8
"""An instance that needs this share of the shards takes everything instead (placement rules)."""


# --- the model ----------------------------------------------------------------------------------


class Strategy(StrEnum):
    """How signals find the instances: the engine, and what an instance subscribes to."""

    PUBSUB_FANOUT = "pubsub-fanout"
    """Everything, on the shared topic: fan-out (docs/roadmap.md)."""
    PUBSUB_FILTER = "pubsub-filter"
    """A filtered subscription for each shard, on the shared topic (phase 2 of docs/roadmap.md)."""
    PUBSUB_PREFIX = "pubsub-prefix"
    """One filtered subscription, for the leading digits of its shards."""
    PUBSUB_TOPIC = "pubsub-topic"
    """A topic for each shard."""
    NATS_FANOUT = "nats-fanout"
    """All subjects."""
    NATS_SUBJECT = "nats-subject"
    """A subject for each shard."""
    REDIS_FANOUT = "redis-fanout"
    """All channels."""
    REDIS_CHANNEL = "redis-channel"
    """A channel for each shard, which is a sharded one on a Redis Cluster."""

    @property
    def is_fanout(self) -> bool:
        """Every instance receives everything."""
        return self is FANOUT[self.engine]

    @property
    def is_filtered(self) -> bool:
        """Subscriptions of one shared topic drop what they do not want, and that is charged."""
        return self in {Strategy.PUBSUB_FILTER, Strategy.PUBSUB_PREFIX}

    @property
    def engine(self) -> Engine:
        """What carries the signals."""
        return next(engine for engine in FANOUT if self.startswith(f"{engine}-"))


FANOUT: dict[Engine, Strategy] = {
    "pubsub": Strategy.PUBSUB_FANOUT,
    "nats": Strategy.NATS_FANOUT,
    "redis": Strategy.REDIS_FANOUT,
}
PARTITIONED: dict[Engine, Strategy] = {
    "pubsub": Strategy.PUBSUB_TOPIC,
    "nats": Strategy.NATS_SUBJECT,
    "redis": Strategy.REDIS_CHANNEL,
}
"""The cheapest way to partition."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The load of a cluster. Rates are not negative, counts at least 1, shares 0 to 1.

    A *message* is one signal on the transport and carries ``pokes_per_message`` pokes, so the
    cluster bears ``messages_per_s * pokes_per_message`` pokes a second. Each poke is for a
    recipient with a session on one instance; ``misplaced_share`` of the sessions are on another
    instance than their shard's owner, evenly. A session hears ``recipients_per_session``, its own
    included. The others are of any shard, and no two sessions hear the same.
    """

    messages_per_s: float
    instances: int
    shards: int = 100
    sessions: int = 0
    misplaced_share: float = 0.0
    recipients_per_session: float = 1.0
    pokes_per_message: float = 1.0
    poke_size_bytes: float = 50.0
    """``{"recipient":"urn:user:bob","version":17}`` has 42."""
    messages_per_request: Range = Range(1, 200)
    """How many messages share a publish request or a response. Google decides the latter; 200 is
    the most that was measured."""
    red_line_ops_per_s: float = RED_LINE_OPS_PER_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """The cost of a load under a strategy, for the whole cluster.

    ``deliveries_per_s`` are the global operations of docs/roadmap.md: messages a second, once for
    each instance that receives them. ``discarded_share`` of them find no session, at most.
    ``held_share`` is the share of the shards that an instance receives. ``filtered_share`` is
    the share of charged deliveries that a filter dropped. ``cpu_cores_wasted`` go into what is
    discarded. ``admin_ops_to_deploy`` replace every instance once, ``admin_ops_per_min`` are those
    of a quiet cluster; both are Google's. ``obstacles`` are limits that it would break, in words.
    """

    strategy: Strategy
    deliveries_per_s: float
    discarded_share: float
    held_share: float
    filtered_share: float
    cpu_cores_wasted: Range
    subscriptions: int
    admin_ops_to_deploy: int
    admin_ops_per_min: int
    usd_a_month: Range
    over_red_line: bool
    obstacles: tuple[str, ...]


def evaluate(load: Workload, strategy: Strategy, prices: Prices = PRICES) -> Outcome:
    """What ``load`` costs under ``strategy``."""
    copies, subscriptions, topics = _spread(load, strategy)
    filtered = max(subscriptions - copies, 0.0) if strategy.is_filtered else 0.0
    deliveries_per_s = load.messages_per_s * copies
    discarded_share = 1 - 1 / copies
    is_google = strategy.engine == "pubsub"
    per_min = LISTINGS_PER_MIN * math.ceil(subscriptions / SUBSCRIPTIONS_PER_LISTING)
    admin_ops_per_min = load.instances * per_min if is_google else 0
    wasted_us = _received_us(load, strategy)
    wasted_per_s = deliveries_per_s * discarded_share
    return Outcome(
        strategy=strategy,
        deliveries_per_s=deliveries_per_s,
        discarded_share=discarded_share,
        held_share=copies / load.instances,
        filtered_share=filtered / (filtered + copies),
        cpu_cores_wasted=Range(
            wasted_per_s * wasted_us.low / 1e6, wasted_per_s * wasted_us.high / 1e6
        ),
        subscriptions=subscriptions,
        admin_ops_to_deploy=2 * subscriptions if is_google else 0,
        admin_ops_per_min=admin_ops_per_min,
        usd_a_month=(
            _google_usd_a_month(load, 1 + copies, filtered, prices)
            if is_google
            else prices.servers_usd_a_month
        ),
        over_red_line=deliveries_per_s > load.red_line_ops_per_s,
        obstacles=(
            _obstacles(load, strategy, subscriptions, topics, admin_ops_per_min)
            if is_google
            else ()
        ),
    )


class _Spread(NamedTuple):
    copies: float
    """How many instances receive a message."""
    subscriptions: int
    topics: int = 1


def _spread(load: Workload, strategy: Strategy) -> _Spread:
    instances = load.instances
    if strategy.is_fanout:
        return _Spread(instances, instances)
    units = _prefixes(load) if strategy is Strategy.PUBSUB_PREFIX else load.shards
    copies = _copies(load, units)
    is_wide = copies / instances >= WIDEN_AT
    if is_wide:
        copies = instances
    if strategy is Strategy.PUBSUB_TOPIC:
        # The shared topic stays, for signals without a shard: a subscription more an instance.
        return _Spread(copies, math.ceil(units * copies) + instances, topics=units + 1)
    if is_wide:
        return _Spread(instances, instances)
    if strategy is Strategy.PUBSUB_PREFIX:  # signals without a shard are in the same filter
        a_filter = math.ceil(units * copies / instances / PREFIXES_PER_FILTER)
        return _Spread(copies, instances * a_filter)
    return _Spread(copies, math.ceil(units * copies) + instances)


def _copies(load: Workload, units: int) -> float:
    """How many instances need a unit: a shard, or a group of shards.

    A shard has one owner, a group as many as there are among its shards. Sessions that are not
    with them fall on the others evenly and independently (Poisson), so an instance has none of a
    unit's with the probability exp(-mean). What sessions hear beside their own recipients falls on
    all instances in the same way.
    """
    owners = max(1.0, min(load.instances, load.shards) / units)
    others = load.instances - owners
    if others <= 0:
        return load.instances
    mean = load.sessions * load.misplaced_share / units / others + _heard(load, units)
    return owners - others * math.expm1(-mean)


def _heard(load: Workload, units: int) -> float:
    """How many recipients of a unit the sessions of an instance hear beside their own."""
    return load.sessions * (load.recipients_per_session - 1) / load.instances / units


def misplaced_share(load: Workload, copies: float) -> float:
    """The share with which a shard a unit makes ``copies`` of each message, as was measured.

    This is ``_copies`` solved for it; ``copies`` beyond what any share explains is all of them.
    """
    others = load.instances - 1
    reached = min(max(copies - 1, 0.0) / others, 1.0) if others else 0.0
    if not reached or not load.sessions:
        return 0.0
    mean = -math.log1p(-reached) if reached < 1 else math.inf
    mean = max(mean - _heard(load, load.shards), 0.0)
    return min(mean * others * load.shards / load.sessions, 1.0)


def _prefixes(load: Workload) -> int:
    """How many groups the leading digits of the shard make: as many as fit into one filter."""
    counts = [min(load.shards, 10**digits) for digits in (1, 2, 3, 4)]
    fitting = [
        count for count in counts if math.ceil(count / load.instances) <= PREFIXES_PER_FILTER
    ]
    return max(fitting, default=counts[0])


def _received_us(load: Workload, strategy: Strategy) -> Range:
    """CPU time of a message that is received and dropped."""
    decode_us = load.pokes_per_message * CPU_COSTS.poke.at(load.pokes_per_message)
    match strategy.engine:
        case "nats":
            receive_us = CPU_COSTS.nats_receive_us
        case "redis":
            receive_us = CPU_COSTS.redis_receive_us
        case "pubsub":
            batch, cost = load.messages_per_request, CPU_COSTS.pubsub_receive
            receive_us = Range(cost.at(batch.high), cost.at(batch.low))
    return Range(receive_us.low + decode_us, receive_us.high + decode_us)


def _google_usd_a_month(load: Workload, transfers: float, filtered: float, prices: Prices) -> Range:
    """Google's bill for messages that are each transferred and filtered so often.

    Whether the minimum of a request applies to a message that a filter dropped, and so was in no
    request, Google does not say.
    """
    size_bytes = load.pokes_per_message * load.poke_size_bytes + prices.message_overhead_bytes
    batch = load.messages_per_request

    def bill(transfer_bytes: float, filtered_bytes: float) -> float:
        a_message = transfers * transfer_bytes + filtered * filtered_bytes
        total = load.messages_per_s * a_message * SECONDS_A_MONTH
        return max(0.0, total - prices.free_bytes_a_month) / 2**40 * prices.usd_per_tib

    minimum = prices.min_request_bytes
    return Range(
        bill(max(size_bytes, minimum / batch.high), size_bytes),
        bill(max(size_bytes, minimum / batch.low), max(size_bytes, minimum)),
    )


def _obstacles(
    load: Workload, strategy: Strategy, subscriptions: int, topics: int, admin_ops_per_min: int
) -> tuple[str, ...]:
    found = []
    if subscriptions > MAX_SUBSCRIPTIONS:
        found.append(f"{subscriptions:,} subscriptions, and Google allows {MAX_SUBSCRIPTIONS:,}")
    if topics > MAX_TOPICS:
        found.append(f"{topics:,} topics, and Google allows {MAX_TOPICS:,}")
    if admin_ops_per_min > MAX_ADMIN_OPS_PER_MIN:
        found.append(
            f"{admin_ops_per_min:,} administrative operations a minute,"
            f" and Google allows {MAX_ADMIN_OPS_PER_MIN:,}"
        )
    if not strategy.is_fanout and load.shards < load.instances:
        found.append(f"{load.shards:,} shards leave some of {load.instances:,} instances idle")
    return tuple(found)


# --- advice -------------------------------------------------------------------------------------

_HOW_TO_PARTITION: dict[Engine, str] = {
    "pubsub": "a topic a shard (carrier = topic)",
    "nats": "a subject a shard",
    "redis": "a channel a shard",
}
Verdict = Literal["fine", "near", "critical"]


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, and why, in a sentence or two."""

    verdict: Verdict
    text: str


def advise(
    load: Workload,
    engine: Engine = "pubsub",
    mode: Mode = "fanout",
    prices: Prices = PRICES,
) -> Advice:
    """Whether fan-out bears ``load``, and what else would; ``mode`` is the cluster's now.

    ``critical`` is a cluster in fan-out that is over the line, ``near`` one that is just below.
    """
    fanout = evaluate(load, FANOUT[engine], prices)
    of_line = fanout.deliveries_per_s / load.red_line_ops_per_s
    times = f"{of_line:.3g} times" if fanout.over_red_line else f"{format_share(of_line)} of"
    figures = (
        f"{fanout.deliveries_per_s:,.0f} deliveries/s are {times} the red line of"
        f" {load.red_line_ops_per_s:,.0f}"
    )
    if mode == "partitioned":
        if of_line >= MIGRATE_RULES.leave_at:
            return Advice("fine", f"stay partitioned: in fan-out {figures}.")
        return Advice("fine", f"fan-out would do: {figures}, and it needs no coordination.")
    if not fanout.over_red_line:
        if of_line >= NEAR_SHARE:
            text = f"stay with fan-out, and get ready to partition: {figures}"
            return Advice("near", f"{text}, which more messages or instances will cross.")
        return Advice("fine", f"stay with fan-out: {figures}, and it needs no coordination.")
    partitioned = evaluate(load, PARTITIONED[engine], prices)
    wasted = f"{figures}, and {format_share(fanout.discarded_share)} of them are discarded"
    if partitioned.deliveries_per_s > NEAR_SHARE * fanout.deliveries_per_s:
        return Advice(
            "critical",
            f"put more pokes into a message: {wasted}. Partitioning would still deliver"
            f" {partitioned.deliveries_per_s:,.0f}/s{_reason(load, partitioned)}.",
        )
    bill = (
        f", for {format_usd(partitioned.usd_a_month)} a month"
        f" instead of {format_usd(fanout.usd_a_month)}"
        if engine == "pubsub"
        else ""
    )
    limits = f" But mind: {'; '.join(partitioned.obstacles)}." if partitioned.obstacles else ""
    return Advice(
        "critical",
        f"partition, with {_HOW_TO_PARTITION[engine]}: {wasted}. Partitioned they are"
        f" {partitioned.deliveries_per_s:,.0f}/s, {format_share(partitioned.discarded_share)}"
        f" discarded{bill}.{limits}",
    )


def _reason(load: Workload, partitioned: Outcome) -> str:
    if load.instances == 1:
        return ", for one instance takes everything"
    if load.recipients_per_session > 1:
        return (
            f", for the recipients that an instance's sessions hear are of"
            f" {format_share(partitioned.held_share)} of the shards (docs/groups.md)"
        )
    return ", for too many sessions are on another instance than their shard's owner"


def format_usd(amount: Range) -> str:
    """``amount`` for people, in whole dollars."""
    low, high = round(amount.low), round(amount.high)
    return f"${low:,}" if low == high else f"${low:,}-{high:,}"


def format_share(share: float) -> str:
    """``share`` for people, in percent: three digits, so that 99.8% is not all."""
    if 0 < share < LEAST_SHARE:
        return f"<{LEAST_SHARE:.2%}"
    return f"{share * 100:.3g}%"
