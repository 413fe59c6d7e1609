"""One simulated cluster with its clients and its bad luck, from one seed."""

import asyncio
from collections import Counter
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random
from typing import TypeVar
from unittest.mock import patch
from uuid import UUID

from pokebridge.errors import TransportError, UnavailableError
from pokebridge.gateway import audiences, bridge
from pokebridge.gateway.audiences import LARGE
from pokebridge.model import NewMessage, Poke, Receipt, Selection
from pokebridge.sharding import shard_of
from pokebridge.transport.base import Signal
from pokebridge.wire import encode_pokes
from simulation.caller import SimCaller
from simulation.client import HOME_URL, SimClient, SimShell
from simulation.http import TIMEOUT_S as HTTP_TIMEOUT_S
from simulation.instance import SimInstance, ask
from simulation.invariants import Oracle, Violation, WatchedClient
from simulation.loop import LivelockError, Scheduler, VirtualLoop
from simulation.network import Peer
from simulation.scene import GROUP_PREFIX, Config, Scene
from simulation.sockets import Network
from simulation.trace import Trace
from simulation.witness import WitnessOracle

T = TypeVar("T")

WORKERS: Sequence[int] = (1, 1, 2, 3)
"""How many worker processes the instances of a world may have."""
RECOVERY_BOUND_S = 110.0
"""How long the cluster has to recover after the last fault; derived in docs/simulation.md."""
DEAF_BOUND_S = 17.0
"""After this plus three leases an instance that receives nothing owns no shard, if others
receive."""
STEADY_BOUND_S = 1.0
"""How long a message may take to every client once the cluster has recovered."""
_START_BOUND_S = 30.0
_AT_MOST_S = 600.0
_UNNOTICED_S = 2.0
_LOOK_EVERY_S = 0.5
_DRAINED_LOOKS = 40


def _apart(rng: Random) -> Random:
    """Another generator, which takes nothing from ``rng``.

    It decides which clients listen or poll. So the rest of a seed's world does not depend on that.
    """
    return Random(str(rng.getstate()))  # noqa: S311 - it is to be repeated


def draw_config(rng: Random, faults: Collection[str]) -> Config:
    """A world at random, with some of the ``faults``."""
    apart = _apart(rng)
    return Config(
        instances=rng.randint(2, 5),
        broker_servers=rng.choice((1, 1, 2, 3)),
        verify_every_s=rng.choice((5.0, 10.0, 20.0)),
        recipients=rng.randint(5, 12),
        shard_count=rng.choice((8, 16, 24)),
        mode=rng.choice(("fanout", "partitioned")),
        assignment="ring" if rng.random() < 0.2 else "coordinator",
        lease_s=rng.choice((2.0, 3.0, 5.0)),
        sticky=rng.random() < 0.5,
        fresh_names=rng.random() < 0.3,
        chaos_s=rng.uniform(20.0, 50.0),
        fault_every_s=rng.uniform(1.0, 4.0),
        message_every_s=rng.uniform(0.2, 1.0),
        legacy_share=rng.choice((0.0, 0.3)),
        faults=[fault for fault in faults if rng.random() < 0.5] or ["kill"],
        workers=rng.choice(WORKERS) if len(WORKERS) > 1 else WORKERS[0],
        groups=apart.randint(1, 2),
        listen_share=apart.choice((0.0, 0.1, 0.3)),
        listens_at_most=apart.choice((0, 1, 10, 10)),
        transport=apart.choice(("auto", "auto", "websocket")),
        poll_share=apart.choice((0.0, 0.0, 0.2)),
        callers=apart.choice((0, 1, 3)),
        large_audience=apart.choice((2, LARGE)),
        audience_pulls_per_s=apart.choice((50.0, 1000.0)),
    )


@contextmanager
def _large_audiences(sessions: int) -> Iterator[None]:
    """Make instances treat more than ``sessions`` of a recipient as a large audience."""
    slice_ = min(sessions, audiences.SLICE)
    with (
        patch.multiple(audiences, LARGE=sessions, SLICE=slice_),
        patch.object(bridge, "LARGE", sessions),
    ):
        yield


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one seed."""

    seed: int
    violation: Violation | None
    digest: str
    """A hash of all that happened: the same for the same seed and code, on any machine."""
    last: Sequence[str]
    virtual_s: float
    callbacks: int
    messages: int
    deliveries: int
    lost: int
    doubled: int
    moves: int
    listened: int
    polled: int
    switched: int
    faults: Counter[str]
    silences_s: Sequence[float]
    bounded_s: Sequence[float]
    waits_s: Sequence[float]
    recovery_s: float


Fault = Callable[["World"], Coroutine[None, None, None]]
"""Something that goes wrong, from its beginning to its end."""


class World(Scene):
    """All processes of one simulated cluster, and its story; ``faults`` are the possible ones."""

    def __init__(
        self, seed: int, scheduler: Scheduler, trace: Trace, faults: Mapping[str, Fault]
    ) -> None:
        self.seed = seed
        rng = Random(seed)  # noqa: S311 - it is to be repeated
        super().__init__(draw_config(rng, faults), rng, scheduler, trace)
        self._listen_rng = _apart(rng)
        self._possible_faults = faults
        self.oracle = Oracle(self)
        self.witnesses = WitnessOracle(self, self.oracle.fail)
        self.names: dict[str, SimInstance | None] = {}
        """The instances that the supervisor keeps running, by name; None while one is down."""
        self.clients: list[SimClient] = []
        self.callers: list[SimCaller] = []
        numbers = range(self.config.recipients)
        self.users = [f"urn:user:{UUID(int=number)}" for number in numbers]
        self.everyone = [*self.users, *(f"{GROUP_PREFIX}{n}" for n in range(self.config.groups))]
        """All recipients: users, each with clients of its own, and groups."""
        self.faults: Counter[str] = Counter()
        self.denials: dict[str, frozenset[Selection]] = {}
        """What the broker does not let an instance subscribe to, by the name that stays."""
        self.kills_next_committer = False
        self.pauses_next_writer = False
        self._all: list[SimInstance] = []
        self._backend = Peer(self.outside, "backend")
        self._network = Network(self.rng)
        self._sent = 0
        self._unaccepted = 0
        self._recovery_s = 0.0
        self._chaos_ends_at = float("inf")
        self._by_name: dict[str, SimInstance] = {}
        self._launches = 0
        self._client_loops = 0
        scheduler.on_error = lambda what: self.oracle.fail("no error goes uncaught", what)
        self.broker.on_delivered = self.witnesses.heard
        self.store.on_writes = self._on_writes
        self.store.knowledge_of = self.oracle.knowledge_of
        self.store.on_members = self.oracle.on_members
        self.store.on_written = self.oracle.on_written
        self.post.on_committed = self._on_committed
        self.broker.slow_starts_s = self.rng.choice((0.0, 0.3, 1.5))
        self.broker.ordered = self.rng.random() < 0.5
        self.broker.late_share = self.rng.choice((0.0, 0.05))
        self.broker.double_share = self.rng.choice((0.0, 0.05))
        self.store.late_expiry = self.rng.random() < 0.5

    # --- instances and clients --------------------------------------------------------------------

    @property
    def running(self) -> list[SimInstance]:
        """The instances whose process is alive."""
        return [each for each in self._all if each.died_at is None]

    @property
    def well_instances(self) -> list[SimInstance]:
        """The instances that serve and have no trouble."""
        return [each for each in self.running if each.is_well]

    @property
    def hearers(self) -> list[SimShell]:
        """The clients, and what they listen to."""
        return [each for client in self.clients for each in (client, *client.listens)]

    @property
    def watched(self) -> Sequence[WatchedClient]:
        """The clients that must get every message."""
        return [*self.hearers, *self.callers]

    def hearers_of(self, recipient: str) -> list[SimShell]:
        """The clients that listen to ``recipient``."""
        return [each for each in self.hearers if each.recipient == recipient and each.active]

    def add_instance(self) -> None:
        """Have a supervisor keep one more instance running."""
        self._launches += 1
        base = f"i{self._launches}"
        self.names[base] = None
        self.outside.create_task(self._supervise(base))

    async def _supervise(self, base: str) -> None:
        life = 0
        while base in self.names:
            life += 1
            name = f"{base}-{life}" if self.config.fresh_names else base
            instance = SimInstance(self, self.oracle, self._process(name), base)
            if base in self.denials:
                self._deny(instance)
            self.names[base] = self._by_name[name] = instance
            self._all.append(instance)
            instance.start()
            await instance.ended
            self.trace.note(name, "has ended")
            await asyncio.sleep(self.rng.choice((0.3, 6.0)) * self.rng.uniform(0.5, 1.5))

    def deny(self, base: str, selections: frozenset[Selection]) -> None:
        """Make the broker refuse ``selections`` to an instance and to those that replace it."""
        self.denials[base] = selections
        for instance in self.running:
            if instance.base == base:
                self._deny(instance)

    def _deny(self, instance: SimInstance) -> None:
        instance.denial.begin()
        self.broker.deny(instance, self.denials[instance.base])

    def permit(self, base: str) -> None:
        """End a ``deny``."""
        del self.denials[base]
        for instance in self._all:
            if instance.base == base and instance.denial.active:
                instance.denial.end()
                self.broker.deny(instance, frozenset())

    def add_client(self, recipient: str) -> None:
        """One more device of ``recipient``."""
        self._client_loops += 1
        name = f"c{self._client_loops}"
        polls = self._listen_rng.random() < self.config.poll_share
        client = SimClient(
            *(self, self.oracle, self.route, self._process(name), recipient),
            transport="poll" if polls else self.config.transport,
        )
        self.clients.append(client)
        start_s = self.rng.uniform(0, 3.0)
        self.outside.call_later(start_s, client.start)
        for other in self.everyone:
            if other != recipient and self._listen_rng.random() < self._listen_share(other):
                self.outside.call_later(start_s + 0.1, self.listen, client, other)

    def add_caller(self) -> None:
        """A program that only calls, for a user or a group."""
        self._client_loops += 1
        process = self._process(f"p{self._client_loops}")
        recipient = self._listen_rng.choice(self.everyone)
        caller = SimCaller(self, self.oracle, self._route_home, process, recipient, self._network)
        self.callers.append(caller)
        self.outside.call_later(self._listen_rng.uniform(0, 3.0), caller.start)

    def _listen_share(self, recipient: str) -> float:
        """Many listen to a group, and few to another user."""
        share = self.config.listen_share
        return share if recipient.startswith(GROUP_PREFIX) else share / self.config.recipients

    def listen(self, client: SimClient, recipient: str) -> None:
        """Have ``client`` listen to ``recipient`` as well."""
        client.loop.deliver(0.0, client.listen, recipient)

    def _process(self, name: str) -> VirtualLoop:
        """A process with clocks of its own."""
        return self.scheduler.process(
            name,
            clock_s=self.rng.uniform(0, 1e5),
            pace=1 + self.rng.uniform(-0.002, 0.002),
            wall_ahead_s=self.rng.uniform(-1.0, 1.0),
        )

    # --- the network between ----------------------------------------------------------------------

    def route(self, url: str, recipient: str = "") -> SimInstance | None:
        """The instance that a connection to ``url`` gets to, for ``recipient`` if that is known."""
        if url != HOME_URL:
            return self._by_name.get(url.removeprefix("wss://").partition(".")[0])
        rotation = [each for each in self._all if self._is_in_rotation(each)]
        if not rotation:  # fails open, as most balancers can: if none is ready, all are used
            rotation = [each for each in self.running if each.listens and not each.stopping]
        if not rotation:
            return None
        if recipient and self.config.sticky:
            return rotation[shard_of(recipient, len(rotation))]
        return self.rng.choice(rotation)

    def _route_home(self, recipient: str) -> SimInstance | None:
        return self.route(HOME_URL, recipient)

    def _is_in_rotation(self, instance: SimInstance) -> bool:
        """Whether the load balancer sends to it: the balancer notices a failure late."""
        if instance.died_at is not None:
            was_in = self.scheduler.now - instance.died_at < _UNNOTICED_S
            return was_in and not instance.stopping
        if not instance.listens or instance.stopping or instance.real.gateway.draining:
            return False
        return max(instance.trouble.lasts_s, instance.line.lasts_s) < _UNNOTICED_S

    def _on_committed(self, peer: Peer, message: NewMessage, receipt: Receipt) -> None:
        concerned = [each for each in self.watched if each.recipient == message.recipient]
        active = [each for each in concerned if each.active]
        self.oracle.on_committed(peer, message, receipt, active)
        spare = [each for each in self.well_instances if each is not peer]
        if self.kills_next_committer and isinstance(peer, SimInstance) and spare:
            self.kills_next_committer = False
            self.outside.deliver(0.0, peer.kill)

    def _on_writes(self, peer: Peer) -> bool:
        spare = [each for each in self.well_instances if each is not peer]
        if not (self.pauses_next_writer and isinstance(peer, SimInstance) and spare):
            return False
        self.pauses_next_writer = False
        self.trace.note(peer.name, "is stopped while it writes")
        peer.loop.pause()
        peer.trouble.begin()
        self.outside.create_task(self._resume(peer))
        return True

    async def _resume(self, instance: SimInstance) -> None:
        await self.nap(self.rng.uniform(0.5, 3.0) * self.config.lease_s)
        self.trace.note(instance.name, "goes on")
        instance.loop.resume()
        instance.trouble.end()

    # --- messages ---------------------------------------------------------------------------------

    def send_soon(
        self, recipient: str, *, legacy: bool = False, through: SimInstance | None = None
    ) -> None:
        """A backend has something for ``recipient`` and sends it until it is accepted.

        It tries the instance ``through`` first.
        """
        self._sent += 1
        self._unaccepted += 1
        message = NewMessage(
            recipient, "backend", f"m{self._sent}", b"{}", has_idempotency_key=True
        )
        if legacy:
            self.outside.create_task(self._send_by_hand(message))
        else:
            self._try_to_send(message, through)

    def _try_to_send(self, message: NewMessage, through: SimInstance | None = None) -> None:
        def tried(receipt: Receipt | None) -> None:
            if receipt is None:
                self.outside.call_later(self.rng.uniform(0.2, 1.0), self._try_to_send, message)
            else:
                self._unaccepted -= 1

        instance = through or self.route(HOME_URL)
        ask(self.outside, self._network, instance, lambda at: at.send(message), tried)

    def publish_by_hand(self, body: bytes, shard: int | None) -> None:
        """Publish any bytes, as another program may. Nobody cares whether they are accepted."""
        with suppress(TransportError):
            self.broker.take(self._backend, [Signal(body, shard)])

    async def _send_by_hand(self, message: NewMessage) -> None:
        """Send as a backend with a publisher of its own, which does not know of shards."""
        mailbox = self.post.connect(self._backend)
        transport = self.broker.connect(self._backend)
        receipt = await self._keep_trying(lambda: mailbox.append(message))
        poke = Poke(message.recipient, receipt.version)
        said = poke if self.rng.random() < 0.5 else Poke(message.recipient)
        await self._keep_trying(lambda: transport.publish([Signal(encode_pokes([said]))]))
        await self._keep_trying(lambda: mailbox.confirm_outbox([poke]))
        self._unaccepted -= 1

    async def _keep_trying(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except UnavailableError:
                await asyncio.sleep(self.rng.uniform(0.05, 0.3))

    # --- the story --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run the story to its end, or to the first violation."""
        story = self.outside.create_task(self._tell())
        story.add_done_callback(lambda _: self.scheduler.stop())
        try:
            with _large_audiences(self.config.large_audience):
                has_ended = self.scheduler.run(_AT_MOST_S)
            if not has_ended:
                self.oracle.fail("an end", "the story does not end")
        except LivelockError as error:
            self.oracle.fail("time goes on", str(error))
        if story.done():
            story.result()
        outcome = self._outcome()
        for loop in [self.outside, *(loop for each in self._all for loop in each.loops)]:
            loop.reap()
        return outcome

    async def nap(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the chaos."""
        await asyncio.sleep(max(0.0, min(seconds, self._chaos_ends_at - self.scheduler.now)))

    async def _tell(self) -> None:
        config = self.config
        self.trace.note("world", repr(config))
        for _ in range(config.instances):
            self.add_instance()
        for recipient in self.users:
            for _ in range(self.rng.choice((1, 1, 2))):
                self.add_client(recipient)
        for _ in range(config.callers):
            self.add_caller()
        looking = self.outside.create_task(self._look())
        await self._until_nothing(self._who_is_missing, _START_BOUND_S, "all start")
        self._chaos_ends_at = self.scheduler.now + config.chaos_s
        sending = self.outside.create_task(self._keep_sending())
        await self._cause_chaos()
        sending.cancel()
        self.pauses_next_writer = self.kills_next_committer = False
        self.trace.note("world", "nothing goes wrong any more")
        healed_at = self.scheduler.now
        await self._until_nothing(self._what_is_wrong, RECOVERY_BOUND_S, "all recovers")
        self._recovery_s = self.scheduler.now - healed_at
        self.trace.note("world", "all has recovered")
        # After this, all calls without an answer have timed out.
        await asyncio.sleep(max(0.0, healed_at + HTTP_TIMEOUT_S - self.scheduler.now))
        self.broker.late_share = 0.0
        sent_at = self.scheduler.now
        for recipient in self.everyone:
            self.send_soon(recipient)
        await self._until_nothing(self._what_is_unaccepted, STEADY_BOUND_S, "all recovers")
        await self._until_nothing(
            lambda: self._who_is_behind(sent_at), STEADY_BOUND_S, "no silence"
        )
        looking.cancel()

    async def _look(self) -> None:
        drained: Counter[SimInstance] = Counter()
        while True:
            views = [(each, each.real.cluster.view.shard_map) for each in self.running]
            self.oracle.look_at_views(views)
            self._look_at_the_deaf()
            for instance in self.running:
                if instance.listens and instance.real.gateway.draining:
                    drained[instance] += 1
                    if drained[instance] == _DRAINED_LOOKS:
                        instance.stop()  # as an operator does who finds it drained
            await asyncio.sleep(_LOOK_EVERY_S)

    def _look_at_the_deaf(self) -> None:
        """Check that an instance that misses signals has given up its shards and sessions."""
        bound_s = DEAF_BOUND_S + 3 * self.config.lease_s
        long_ago = self.scheduler.now - bound_s
        calm_at = max(self.store.trouble.over_at, self.broker.trouble.over_at)
        hearing_at = min(
            (each.hears_since for each in self.running if each.serves), default=float("inf")
        )
        if max(calm_at, hearing_at) > long_ago:
            return
        for each in self.running:
            if each.trouble.over_at > long_ago:
                continue
            if each.line.lasts_s > bound_s and each.denial.over_at <= long_ago:
                self.oracle.look_at_deaf(each, self.hearers, long_ago)
            if each.denial.lasts_s > bound_s:
                self.oracle.look_at_denied(each, long_ago)

    async def _keep_sending(self) -> None:
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / self.config.message_every_s))
            legacy = self.rng.random() < self.config.legacy_share
            self.send_soon(self.rng.choice(self.everyone), legacy=legacy)

    async def _cause_chaos(self) -> None:
        under_way = []
        while self.scheduler.now < self._chaos_ends_at:
            await self.nap(self.rng.expovariate(1 / self.config.fault_every_s))
            fault = self.rng.choice(self.config.faults)
            self.faults[fault] += 1
            under_way.append(self.outside.create_task(self._possible_faults[fault](self)))
        await asyncio.gather(*under_way)

    async def _until_nothing(
        self, wrong: Callable[[], str], within_s: float, invariant: str
    ) -> None:
        """Wait until ``wrong`` returns an empty text."""
        deadline = self.scheduler.now + within_s
        while what := wrong():
            if self.scheduler.now >= deadline:
                self.oracle.fail(invariant, f"not within {within_s:.0f} s: {what}")
            await asyncio.sleep(0.05)

    def _who_is_missing(self) -> str:
        return " ".join(
            base for base, each in self.names.items() if each is None or not each.is_well
        )

    def _what_is_unaccepted(self) -> str:
        return f"{self._unaccepted} messages" if self._unaccepted else ""

    def _who_is_behind(self, since_s: float) -> str:
        """Clients that miss messages although nothing has disturbed them since ``since_s``."""
        return " ".join(
            f"{each.name} on {each.instance and each.instance.name}"
            for each in self.watched
            if each.active and self.oracle.undisturbed_since(each) <= since_s
            if not self.oracle.is_up_to_date(each)
        )

    def _what_is_wrong(self) -> str:
        """What is still wrong in a cluster without faults. Empty when nothing is."""
        if missing := self._what_is_unaccepted() or self._who_is_missing():
            return f"missing: {missing}"
        for hearer in self.watched:
            if hearer.active and not self.oracle.is_well_and_up_to_date(hearer):
                return f"{hearer.name} is not connected, or not up to date"
        for client in self.clients:
            acked = self.post.mailbox.acked(client.recipient, client.device)
            is_judged = client.active and client.core.acks_by_socket
            if is_judged and self.oracle.owes_ack(client, acked):
                return f"{client.name} has acked {acked} as far as the mailbox knows"
        return self._what_is_unsettled()

    def _what_is_unsettled(self) -> str:
        instances = self.running
        maps = [each.real.cluster.view.shard_map for each in instances]
        if any(each != maps[0] for each in maps):
            return f"instances disagree on the map: epochs {[each.epoch for each in maps]}"
        for each in instances:
            if not each.real.gateway.subscriptions.settled:
                return f"the subscriptions of {each.name} are not settled"
        shard_map = maps[0]
        held = Counter(shard_map.owners)
        fair = shard_map.shard_count / len(instances)
        for each in instances:
            share = held.pop(each.name, 0)
            if self.config.assignment == "coordinator" and not fair - 1 < share < fair + 1:
                return f"{each.name} owns {share} of {shard_map.shard_count} shards"
        return f"strangers own shards: {held}" if held else ""

    def _outcome(self) -> Outcome:
        oracle, broker = self.oracle, self.broker
        self.trace.note("world", f"{self.scheduler.callbacks} callbacks, {self.rng.random()}")
        return Outcome(
            seed=self.seed,
            violation=oracle.violation,
            digest=self.trace.digest,
            last=self.trace.last,
            virtual_s=self.scheduler.now,
            callbacks=self.scheduler.callbacks,
            messages=oracle.committed,
            deliveries=broker.delivered,
            lost=broker.lost,
            doubled=broker.doubled,
            moves=oracle.moves,
            listened=oracle.listened,
            polled=oracle.polled,
            switched=oracle.switched,
            faults=self.faults,
            silences_s=oracle.silences_s,
            bounded_s=oracle.bounded_s,
            waits_s=oracle.waits_s,
            recovery_s=self._recovery_s,
        )
