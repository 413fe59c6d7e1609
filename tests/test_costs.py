"""The cost model's laws, and the two examples of docs/roadmap.md."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pokebridge.costs import (
    CPU_COSTS,
    FANOUT,
    MAX_FILTER_BYTES,
    NEAR_SHARE,
    PARTITIONED,
    PREFIXES_PER_FILTER,
    PRICES,
    SECONDS_A_MONTH,
    WIDEN_AT,
    Engine,
    Range,
    Strategy,
    Workload,
    advise,
    evaluate,
    format_share,
    format_usd,
    misplaced_share,
)
from pokebridge.gateway.shard_routing import ShardRouting
from pokebridge.model import Feed
from pokebridge.placement import Placement, PlacementRules, ShardMap
from pokebridge.red_line import MIGRATE_RULES

ENGINES: list[Engine] = ["pubsub", "nats", "redis"]
batches = st.tuples(st.floats(1, 1000), st.floats(1, 1000)).map(lambda pair: Range(*sorted(pair)))
loads = st.builds(
    Workload,
    messages_per_s=st.floats(0, 1e6),
    instances=st.integers(1, 2000),
    shards=st.integers(1, 10_000),
    sessions=st.integers(0, 10_000_000),
    misplaced_share=st.floats(0, 1),
    recipients_per_session=st.just(1.0) | st.floats(1, 100),
    pokes_per_message=st.floats(1, 500),
    poke_size_bytes=st.floats(20, 300),
    messages_per_request=batches,
)
strategies = st.sampled_from(Strategy)
engines = st.sampled_from(ENGINES)


def at_least(one: float, other: float) -> bool:
    """``one >= other``, but for the last digits of a float."""
    return one >= other or math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


# --- the roadmap's examples ---------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_roadmaps_safe_example(engine: Engine) -> None:
    """100 messages/s and 10 instances are 1,000 operations/s: fan-out is fine."""
    load = Workload(messages_per_s=100, instances=10)
    outcome = evaluate(load, FANOUT[engine])
    assert outcome.deliveries_per_s == 1000
    assert not outcome.over_red_line
    advice = advise(load, engine)
    assert advice.verdict == "fine"
    assert "stay with fan-out: 1,000 deliveries/s are 20% of the red line of 5,000" in advice.text


@pytest.mark.parametrize("engine", ENGINES)
def test_the_roadmaps_critical_example(engine: Engine) -> None:
    """1,000 messages/s and 50 instances are 50,000 operations/s, of which 98% are discarded."""
    load = Workload(messages_per_s=1000, instances=50)
    outcome = evaluate(load, FANOUT[engine])
    assert outcome.deliveries_per_s == 50_000
    assert outcome.discarded_share == pytest.approx(0.98)
    assert outcome.over_red_line
    partitioned = evaluate(load, PARTITIONED[engine])
    assert partitioned.deliveries_per_s == 1000
    assert partitioned.discarded_share == 0
    assert not partitioned.over_red_line
    advice = advise(load, engine)
    assert advice.verdict == "critical"
    assert "50,000 deliveries/s are 10 times the red line of 5,000" in advice.text
    assert "98% of them are discarded" in advice.text


# --- laws ---------------------------------------------------------------------------------------


@given(loads, strategies)
def test_every_figure_is_possible(load: Workload, strategy: Strategy) -> None:
    """Shares are shares, ranges are ordered, nothing is negative."""
    outcome = evaluate(load, strategy)
    assert 0 <= outcome.discarded_share <= 1
    assert 0 <= outcome.filtered_share <= 1
    assert 0 <= outcome.cpu_cores_wasted.low <= outcome.cpu_cores_wasted.high
    assert 0 <= outcome.usd_a_month.low <= outcome.usd_a_month.high
    assert outcome.subscriptions >= load.instances
    assert outcome.deliveries_per_s >= 0


@given(loads, st.integers(1, 500), st.sampled_from([*FANOUT.values()]))
def test_more_instances_are_never_cheaper_in_fanout(
    load: Workload, more: int, strategy: Strategy
) -> None:
    """An instance more costs deliveries, CPU, subscriptions and money, or at best nothing."""
    few = evaluate(load, strategy)
    many = evaluate(replace(load, instances=load.instances + more), strategy)
    assert many.deliveries_per_s >= few.deliveries_per_s
    assert many.discarded_share > few.discarded_share
    assert at_least(many.cpu_cores_wasted.low, few.cpu_cores_wasted.low)
    assert at_least(many.cpu_cores_wasted.high, few.cpu_cores_wasted.high)
    assert many.subscriptions > few.subscriptions
    assert at_least(many.usd_a_month.low, few.usd_a_month.low)
    assert at_least(many.usd_a_month.high, few.usd_a_month.high)


@given(loads, strategies, st.floats(1, 100))
def test_more_messages_are_never_cheaper(load: Workload, strategy: Strategy, factor: float) -> None:
    """Deliveries, CPU and money grow with the rate, whatever the strategy."""
    slow = evaluate(load, strategy)
    fast = evaluate(replace(load, messages_per_s=load.messages_per_s * factor), strategy)
    assert fast.deliveries_per_s >= slow.deliveries_per_s
    assert fast.discarded_share == slow.discarded_share
    assert at_least(fast.cpu_cores_wasted.high, slow.cpu_cores_wasted.high)
    assert at_least(fast.usd_a_month.low, slow.usd_a_month.low)
    assert at_least(fast.usd_a_month.high, slow.usd_a_month.high)


@given(loads, strategies)
def test_partitioned_never_delivers_more_than_fanout(load: Workload, strategy: Strategy) -> None:
    """However badly sessions are placed, and however few shards there are."""
    outcome = evaluate(load, strategy)
    fanout = evaluate(load, FANOUT[strategy.engine])
    assert at_least(fanout.deliveries_per_s, outcome.deliveries_per_s)
    assert at_least(fanout.discarded_share, outcome.discarded_share)
    assert at_least(fanout.cpu_cores_wasted.high, outcome.cpu_cores_wasted.high)


@given(loads, strategies, st.floats(0, 1))
def test_misplaced_sessions_never_save_anything(
    load: Workload, strategy: Strategy, share: float
) -> None:
    """The more sessions are away from their shard's owner, the more instances must hear it."""
    better, worse = sorted([share, load.misplaced_share])
    few = evaluate(replace(load, misplaced_share=better), strategy)
    many = evaluate(replace(load, misplaced_share=worse), strategy)
    assert at_least(many.deliveries_per_s, few.deliveries_per_s)
    assert at_least(many.discarded_share, few.discarded_share)


@given(loads)
def test_one_topic_a_shard_is_billed_once(load: Workload) -> None:
    """With every session in its place a message is charged as published and as delivered once."""
    placed = replace(load, misplaced_share=0.0, recipients_per_session=1.0)
    assume(placed.instances > 1)
    outcome = evaluate(placed, Strategy.PUBSUB_TOPIC)
    published = evaluate(replace(placed, instances=1), Strategy.PUBSUB_FANOUT)
    assert outcome.usd_a_month == published.usd_a_month
    assert outcome.filtered_share == 0


@given(loads)
def test_filters_are_never_cheaper_than_fanout(load: Workload) -> None:
    """Filtered messages are charged, so single shards cost at least as much as everything."""
    filtered = evaluate(load, Strategy.PUBSUB_FILTER)
    fanout = evaluate(load, Strategy.PUBSUB_FANOUT)
    charged_per_s = filtered.deliveries_per_s / (1 - filtered.filtered_share)
    assert at_least(charged_per_s, fanout.deliveries_per_s)
    assert at_least(filtered.usd_a_month.high, fanout.usd_a_month.high)


@given(loads, strategies)
def test_batching_never_costs(load: Workload, strategy: Strategy) -> None:
    """The same pokes in fewer messages raise no cost."""
    single = replace(load, pokes_per_message=1)
    batched = replace(
        load, messages_per_s=load.messages_per_s / 10, pokes_per_message=10, sessions=load.sessions
    )
    one, ten = evaluate(single, strategy), evaluate(batched, strategy)
    assert at_least(one.deliveries_per_s, ten.deliveries_per_s)
    assert at_least(one.cpu_cores_wasted.high, ten.cpu_cores_wasted.high)
    assert at_least(one.usd_a_month.high, ten.usd_a_month.high)


@given(loads, engines)
def test_the_advice_agrees_with_the_figures(load: Workload, engine: Engine) -> None:
    """Critical is over the line, near is just below, fine is well below; the text is one line."""
    fanout = evaluate(load, FANOUT[engine])
    advice = advise(load, engine)
    assert (advice.verdict == "critical") == fanout.over_red_line
    if advice.verdict == "fine":
        assert fanout.deliveries_per_s < NEAR_SHARE * load.red_line_ops_per_s
    assert "\n" not in advice.text
    assert advice.text.endswith(".")


# --- particulars --------------------------------------------------------------------------------


def test_a_cluster_of_one_wastes_nothing() -> None:
    """One instance receives no foreign pokes, so partitioning changes nothing."""
    for strategy in Strategy:
        outcome = evaluate(Workload(messages_per_s=10_000, instances=1), strategy)
        assert outcome.discarded_share == 0
        assert outcome.cpu_cores_wasted == Range(0, 0)
    assert "put more pokes into a message" in advise(Workload(10_000, 1)).text


def test_sessions_at_random_undo_partitioning() -> None:
    """An instance that has sessions of most shards takes everything, and the advice says why."""
    load = Workload(1000, 50, sessions=500_000, misplaced_share=1.0)
    outcome = evaluate(load, Strategy.PUBSUB_TOPIC)
    assert outcome.deliveries_per_s == 50_000
    assert "another instance than their shard's owner" in advise(load).text


@pytest.mark.parametrize("heard", [1.0, 1.02, 1.1, 1.5, 3.0])
def test_listening_sessions_hold_the_shards_that_placement_says(heard: float) -> None:
    """The share of the shards is that of real instances whose sessions hear such recipients."""
    instances, shards, sessions = 10, 100, 2000
    load = Workload(1000, instances, shards, sessions, recipients_per_session=heard)
    chance, held = random.Random(17), []
    owners = tuple(f"i-{shard % instances}" for shard in range(shards))
    for number in range(instances):
        placement = Placement(f"i-{number}")
        routing = ShardRouting(f"i-{number}", ShardMap(1, "partitioned", owners), placement)
        for _ in range(round(sessions / instances * (heard - 1))):
            routing.enter(f"urn:doc:{chance.random()}")
        wanted = routing.wanted(0.0)
        held.append(1.0 if Feed.ALL in wanted else len(wanted - {Feed.UNTAGGED}) / shards)
    outcome = evaluate(load, Strategy.NATS_SUBJECT)
    assert outcome.held_share == pytest.approx(sum(held) / instances, abs=0.05)
    assert (outcome.held_share == 1) == (heard == 3.0)


def test_the_advice_blames_listening() -> None:
    """Where listening undoes partitioning, the advice says how much of the shards it needs."""
    load = Workload(1000, 50, sessions=50_000, recipients_per_session=2)
    text = advise(load).text
    assert "the recipients that an instance's sessions hear are of 100% of the shards" in text
    assert evaluate(load, Strategy.PUBSUB_TOPIC).deliveries_per_s == 50_000


def test_few_misplaced_sessions_cost_a_little() -> None:
    """Each session away from home makes one instance hear one shard more."""
    load = Workload(1000, 50, sessions=10_000, misplaced_share=0.01)
    copies = 1 + 49 * (1 - math.exp(-10_000 * 0.01 / 100 / 49))
    outcome = evaluate(load, Strategy.PUBSUB_FILTER)
    assert outcome.deliveries_per_s == pytest.approx(1000 * copies)
    assert outcome.discarded_share == pytest.approx(1 - 1 / copies)
    assert outcome.subscriptions == math.ceil(100 * copies) + 50


@given(loads)
def test_the_misplaced_share_is_found_in_what_it_does(load: Workload) -> None:
    """It follows from the number of instances per message, measured in partitioned mode."""
    load = replace(load, recipients_per_session=1.0)
    assume(load.instances <= load.shards)
    mean = load.sessions * load.misplaced_share / load.shards / max(load.instances - 1, 1)
    assume(mean < 15)  # beyond that everyone hears everything, whatever the share
    assume(load.instances == 1 or mean > 1e-6)
    expected = load.misplaced_share if load.instances > 1 else 0.0
    copies = 1 - (load.instances - 1) * math.expm1(-mean)
    assert misplaced_share(load, copies) == pytest.approx(expected, rel=1e-3)
    assert misplaced_share(load, load.instances + 1) in {0.0, 1.0}  # a measure is never exact


@pytest.mark.parametrize(
    ("instances", "shards", "prefixes"),
    [(50, 100, 100), (10, 100, 10), (11, 100, 10), (50, 1000, 100), (2000, 10_000, 10_000)],
)
def test_prefixes_share_one_filter(instances: int, shards: int, prefixes: int) -> None:
    """An instance has one subscription; where prefixes are few, several instances share one."""
    load = Workload(1000, instances, shards)
    outcome = evaluate(load, Strategy.PUBSUB_PREFIX)
    assert outcome.subscriptions == instances
    assert outcome.deliveries_per_s == pytest.approx(1000 * max(1, instances / prefixes))
    assert outcome.usd_a_month == evaluate(load, Strategy.PUBSUB_FANOUT).usd_a_month or (
        instances > prefixes
    )


def test_instances_widen_when_placement_says_so() -> None:
    """The model follows the rule by which an instance takes everything."""
    assert PlacementRules().widen_at == WIDEN_AT
    few = Workload(1000, 10, sessions=4000, misplaced_share=0.2)
    copies = 1 + 9 * (1 - math.exp(-4000 * 0.2 / 100 / 9))
    assert copies < WIDEN_AT * 10
    assert evaluate(few, Strategy.PUBSUB_FILTER).deliveries_per_s == pytest.approx(1000 * copies)
    many = replace(few, sessions=8000)
    assert evaluate(many, Strategy.PUBSUB_FILTER).deliveries_per_s == 10_000
    assert evaluate(Workload(1000, 2), Strategy.PUBSUB_FILTER).deliveries_per_s == 1000


def test_the_longest_filter_fits() -> None:
    """As many prefixes as are counted, with the signals without a shard, are within 256 bytes."""
    prefixes = ['hasPrefix(attributes.shard,"42")'] * PREFIXES_PER_FILTER
    assert len(" OR ".join([*prefixes, "NOT attributes:shard"])) <= MAX_FILTER_BYTES


def test_googles_limits_are_named() -> None:
    """A strategy that Google would refuse says which limit it breaks."""
    found = evaluate(Workload(1, 3000, 9000), Strategy.PUBSUB_FILTER).obstacles
    assert "12,000 subscriptions, and Google allows 10,000" in found
    assert "72,000 administrative operations a minute, and Google allows 6,000" in found
    assert evaluate(Workload(1, 3, 10_000), Strategy.PUBSUB_TOPIC).obstacles[1:] == (
        "10,001 topics, and Google allows 10,000",
    )
    idle = "10 shards leave some of 50 instances idle"
    assert idle in evaluate(Workload(1, 50, 10), Strategy.PUBSUB_FILTER).obstacles
    assert f"But mind: {idle}." in advise(Workload(1000, 50, 10)).text
    assert not evaluate(Workload(1, 3000), Strategy.NATS_SUBJECT).obstacles


def test_just_below_the_line_is_near() -> None:
    """At 80% of the line the advice is to get ready."""
    assert advise(Workload(799, 5)).verdict == "fine"
    assert advise(Workload(800, 5)).verdict == "near"
    assert advise(Workload(1000, 5)).verdict == "near"
    assert advise(Workload(1001, 5)).verdict == "critical"


@given(loads, engines)
def test_a_partitioned_cluster_is_told_whether_to_stay(load: Workload, engine: Engine) -> None:
    """It stays until fan-out would be well under the line, as the watch that migrates does."""
    ops_per_s = evaluate(load, FANOUT[engine]).deliveries_per_s
    advice = advise(load, engine, "partitioned")
    assert advice.verdict == "fine"
    well_under = ops_per_s < MIGRATE_RULES.leave_at * load.red_line_ops_per_s
    assert advice.text.startswith("fan-out would do: " if well_under else "stay partitioned: ")


def test_prices_can_be_others() -> None:
    """Twice the price is twice the bill, in the figures and in the advice."""
    dear = replace(PRICES, usd_per_tib=2 * PRICES.usd_per_tib)
    load = Workload(1000, 50)
    usual = evaluate(load, Strategy.PUBSUB_FANOUT).usd_a_month
    doubled = evaluate(load, Strategy.PUBSUB_FANOUT, dear).usd_a_month
    assert doubled.low == pytest.approx(2 * usual.low)
    assert doubled.high == pytest.approx(2 * usual.high)
    assert format_usd(doubled) in advise(load, prices=dear).text


def test_known_batching_narrows_the_range() -> None:
    """With a known number of messages a request only what Google does not say is left open."""
    load = Workload(1000, 50, messages_per_request=Range.exactly(200))
    fanout = evaluate(load, Strategy.PUBSUB_FANOUT)
    assert fanout.usd_a_month.low == fanout.usd_a_month.high
    assert fanout.cpu_cores_wasted.low == fanout.cpu_cores_wasted.high
    filtered = evaluate(load, Strategy.PUBSUB_FILTER)
    assert filtered.usd_a_month.low < filtered.usd_a_month.high


def test_measured_costs_are_met_where_they_were_measured() -> None:
    """The line through two points goes through the two points."""
    for cost in (CPU_COSTS.poke, CPU_COSTS.pubsub_receive):
        assert cost.at(1) == pytest.approx(cost.alone_us)
        assert cost.at(cost.batch_size) == pytest.approx(cost.batched_us)


def test_the_free_volume_is_free() -> None:
    """The first 10 GiB a month are free. More costs $40 per TiB."""
    one_per_s = 2 * (50 + PRICES.message_overhead_bytes) * SECONDS_A_MONTH
    assert one_per_s < PRICES.free_bytes_a_month
    assert evaluate(Workload(1, 1), Strategy.PUBSUB_FANOUT).usd_a_month.low == 0
    rate_per_s = (PRICES.free_bytes_a_month + 2**40) / one_per_s
    outcome = evaluate(Workload(rate_per_s, 1), Strategy.PUBSUB_FANOUT)
    assert outcome.usd_a_month.low == pytest.approx(40)


def test_dollars_for_people() -> None:
    """Whole dollars, and one figure where both ends are the same."""
    assert format_usd(Range(17.4, 4875.5)) == "$17-4,876"
    assert format_usd(Range(0.2, 0.3)) == "$0"


def test_a_share_is_rounded() -> None:
    """A share is shown with three digits, without useless zeros."""
    shares = (0, 0.0000597, 0.0001, 0.99812, 1)
    assert [format_share(each) for each in shares] == ["0%", "<0.01%", "0.01%", "99.8%", "100%"]
