"""What an instance holds, and the way from one set of subscriptions to another."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pokebridge.model import Feed, Mode, Selection
from pokebridge.placement import Placement, PlacementRules, ShardMap, next_steps

COUNT = 20
RULES = PlacementRules(linger_s=30, widen_at=0.5, narrow_at=0.35)


def make_map(mode: Mode, mine: set[int]) -> ShardMap:
    """A map in which ``me`` owns ``mine`` and ``you`` the rest."""
    owners = tuple("me" if shard in mine else "you" for shard in range(COUNT))
    return ShardMap(epoch=1, mode=mode, owners=owners)


def covered(held: dict[Selection, bool]) -> set[int | None]:
    """The shards, None for untagged, whose signals arrive."""
    if held.get(Feed.ALL):
        return {None, *range(COUNT)}
    live = {selection for selection, proven in held.items() if proven}
    shards: set[int | None] = {selection for selection in live if isinstance(selection, int)}
    return shards | ({None} if Feed.UNTAGGED in live else set())


def test_fan_out_holds_everything() -> None:
    """In fan-out mode there is one unfiltered subscription, whoever owns the shards."""
    assert Placement("me").decide(make_map("fanout", {1}), {2}, 0) == {Feed.ALL}


def test_partitioned_holds_owned_and_interesting_shards_and_the_untagged() -> None:
    """It subscribes to the shards of the map and of its sessions, and to untagged signals."""
    wanted = Placement("me", RULES).decide(make_map("partitioned", {1, 2}), {2, 7}, 0)
    assert wanted == {1, 2, 7, Feed.UNTAGGED}


def test_a_shard_lingers() -> None:
    """A shard that is no longer needed is dropped after its time, not earlier."""
    placement = Placement("me", RULES)
    placement.decide(make_map("partitioned", {1}), {7}, 0)
    assert 7 in placement.decide(make_map("partitioned", {1}), set(), 29.9)
    assert 7 not in placement.decide(make_map("partitioned", {1}), set(), 30)


def test_many_shards_become_one_subscription_with_hysteresis() -> None:
    """From half the shards on all is taken; single ones again only well below that."""
    placement = Placement("me", PlacementRules(linger_s=1, widen_at=0.5, narrow_at=0.35))
    shard_map = make_map("partitioned", {0})
    assert placement.decide(shard_map, set(range(10)), 0) == {Feed.ALL}
    assert placement.decide(shard_map, set(range(8)), 10) == {Feed.ALL}
    assert placement.decide(shard_map, set(range(6)), 20) == {Feed.UNTAGGED, *range(6)}
    assert placement.decide(shard_map, set(range(9)), 30) == {Feed.UNTAGGED, *range(9)}


class MakeBeforeBreak(RuleBasedStateMachine):
    """Maps, sessions and proofs come in any order: what is needed and was heard stays heard."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement("me", RULES)
        self.shard_map = make_map("fanout", set())
        self.interest: set[int] = set()
        self.held: dict[Selection, bool] = {Feed.ALL: True}
        self.now = 0.0
        self.heard: set[int | None] = {None, *range(COUNT)}
        self.step()

    def step(self) -> None:
        """What ``SubscriptionManager`` does: subscribe to the new, drop what may go."""
        wanted = self.placement.decide(self.shard_map, self.interest, self.now)
        before = covered(self.held)
        steps = next_steps(wanted, self.held)
        assert not steps.subscribe & self.held.keys()
        assert steps.drop <= self.held.keys() - wanted
        for selection in steps.subscribe:
            self.held[selection] = False
        for selection in steps.drop:
            del self.held[selection]
        needed = self.interest | {None}
        assert covered(self.held) & needed >= before & needed

    @rule(mode=st.sampled_from(["fanout", "partitioned"]), mine=st.sets(st.integers(0, COUNT - 1)))
    def new_map(self, mode: Mode, mine: set[int]) -> None:
        """Another map comes into force."""
        self.shard_map = make_map(mode, mine)
        self.step()

    @rule(shard=st.integers(0, COUNT - 1))
    def session_begins_or_ends(self, shard: int) -> None:
        """A session of a shard comes or goes."""
        self.interest ^= {shard}
        self.step()

    @rule(pick=st.integers(0, COUNT))
    def one_is_proven(self, pick: int) -> None:
        """A subscription's probe has come back."""
        unproven = [selection for selection, live in self.held.items() if not live]
        if unproven:
            self.held[unproven[pick % len(unproven)]] = True
            self.step()

    @rule(pick=st.integers(0, COUNT))
    def one_is_in_doubt(self, pick: int) -> None:
        """A subscription has a gap."""
        self.held[list(self.held)[pick % len(self.held)]] = False
        self.step()

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        """Shards linger, and go."""
        self.now += seconds
        self.step()

    @invariant()
    def it_can_settle(self) -> None:
        """Once everything is proven, exactly what is wanted is held."""
        held = dict.fromkeys(self.held, True)
        wanted = self.placement.decide(self.shard_map, self.interest, self.now)
        for _ in range(2):
            steps = next_steps(wanted, held)
            held |= dict.fromkeys(steps.subscribe, True)
            for selection in steps.drop:
                del held[selection]
        assert held.keys() == wanted


TestMakeBeforeBreak = MakeBeforeBreak.TestCase


@given(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_an_unneeded_shard_does_not_wait_for_others(wanted: set[int], held: set[int]) -> None:
    """Among shards nothing is kept for the sake of another that is not live yet."""
    steps = next_steps({*wanted, Feed.UNTAGGED}, dict.fromkeys({*held, Feed.UNTAGGED}, False))
    assert steps.drop == held - wanted
    assert steps.subscribe == wanted - held
