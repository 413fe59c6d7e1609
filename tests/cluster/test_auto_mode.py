"""The load against the red line, as one instance sees it; the time is the test's."""

from dataclasses import dataclass, field

from pokebridge.cluster.auto_mode import RedLineMonitor
from pokebridge.cluster.load import ClusterLoad
from pokebridge.errors import ConflictError, CoordinationError
from pokebridge.model import Mode
from pokebridge.red_line import WatchRules

RULES = WatchRules(over_for_s=10, under_for_s=30, leave_at=0.5)
LINE = 5000.0


@dataclass
class Cluster:
    """A cluster in a mode, which migrates when it is told to, unless something is in the way."""

    mode: Mode = "fanout"
    migrations: list[Mode] = field(default_factory=list)
    obstacle: Exception | None = None
    attempts: int = 0

    async def migrate(self, mode: Mode, *, force: bool) -> None:
        """Change the mode."""
        assert not force
        self.attempts += 1
        if self.obstacle is not None:
            raise self.obstacle
        self.mode = mode
        self.migrations.append(mode)


async def pass_time(
    red_line: RedLineMonitor,
    cluster: Cluster,
    load: tuple[float, int],
    seconds: range,
    *,
    is_leader: bool = True,
) -> None:
    """A load (messages a second, instances), second by second."""
    messages_per_s, instances = load
    for now in seconds:
        fan_out = messages_per_s * instances
        ops_per_s = fan_out if cluster.mode == "fanout" else messages_per_s
        measured = ClusterLoad(messages_per_s, ops_per_s, instances)
        await red_line.observe(measured, cluster.mode, is_leader=is_leader, now=now)


async def test_auto_migrates_once_and_back_once() -> None:
    """A load that rises over the line and falls again moves the cluster there and back."""
    cluster = Cluster()
    red_line = RedLineMonitor(LINE, RULES, cluster.migrate)
    await pass_time(red_line, cluster, (100, 10), range(60))
    assert cluster.migrations == []
    await pass_time(red_line, cluster, (1000, 10), range(60, 200))
    assert cluster.migrations == ["partitioned"]
    assert not red_line.is_over  # partitioned, it is far below
    await pass_time(red_line, cluster, (100, 10), range(200, 400))
    assert cluster.migrations == ["partitioned", "fanout"]


async def test_without_auto_the_line_is_only_told() -> None:
    """An operator decides; the figure says that it is over, and after a while that it is not."""
    cluster = Cluster()
    red_line = RedLineMonitor(LINE, RULES, None)
    await pass_time(red_line, cluster, (1000, 10), range(60))
    assert red_line.is_over
    await pass_time(red_line, cluster, (10, 10), range(60, 120))
    assert not red_line.is_over


async def test_an_operator_who_goes_back_is_not_overruled() -> None:
    """Auto mode does not repeat a migration before the line is crossed again."""
    cluster = Cluster()
    red_line = RedLineMonitor(LINE, RULES, cluster.migrate)
    await pass_time(red_line, cluster, (1000, 10), range(60))
    cluster.mode = "fanout"
    await pass_time(red_line, cluster, (1000, 10), range(60, 200))
    assert cluster.migrations == ["partitioned"]


async def test_only_the_leader_acts_and_a_new_one_knows_the_past() -> None:
    """A new leader knows what was due and what its predecessor did."""
    cluster = Cluster()
    red_line = RedLineMonitor(LINE, RULES, cluster.migrate)
    await pass_time(red_line, cluster, (1000, 10), range(60), is_leader=False)
    assert cluster.migrations == []
    await pass_time(red_line, cluster, (1000, 10), range(60, 62))
    assert cluster.migrations == ["partitioned"]
    newcomer = RedLineMonitor(LINE, RULES, cluster.migrate)
    await pass_time(newcomer, cluster, (10, 10), range(62, 120))
    assert cluster.migrations == ["partitioned", "fanout"]


async def test_a_store_that_is_away_is_asked_again_and_a_refusal_is_final() -> None:
    """A failed write is retried until it succeeds. A refused one waits for an operator."""
    cluster = Cluster(obstacle=CoordinationError("away"))
    red_line = RedLineMonitor(LINE, RULES, cluster.migrate)
    await pass_time(red_line, cluster, (1000, 10), range(60))
    assert cluster.attempts > 2
    cluster.obstacle = ConflictError("half of the signals carry no shard")
    await pass_time(red_line, cluster, (1000, 10), range(60, 61))
    cluster.obstacle = None
    await pass_time(red_line, cluster, (1000, 10), range(61, 200))
    assert cluster.migrations == []
