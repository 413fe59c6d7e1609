"""What the parts of one simulated world share: its configuration, time, chance, and the servers."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from pokebridge.client.transports import Transport
from pokebridge.mailbox.base import Limits
from pokebridge.model import Mode
from simulation.broker import Broker
from simulation.loop import Scheduler
from simulation.stores import Post, RestorableMailbox, Store
from simulation.trace import Trace

GROUP_PREFIX: Final = "urn:group:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What one seed's world is like."""

    instances: int
    broker_servers: int
    verify_every_s: float
    recipients: int
    shard_count: int
    mode: Mode
    assignment: Literal["coordinator", "ring"]
    lease_s: float
    sticky: bool
    """Whether the load balancer sends a recipient always to the same instance."""
    fresh_names: bool
    """Whether an instance that is restarted has another name."""
    chaos_s: float
    fault_every_s: float
    message_every_s: float
    legacy_share: float
    """Of the messages, those of a backend that pokes by hand and does not tag."""
    faults: Sequence[str]
    workers: int
    """The worker processes of each instance; 1: it has none."""
    groups: int
    """How many groups there are beside the recipients, to whom many clients listen."""
    listen_share: float
    """The chance of a client to listen to a group, or to another recipient."""
    listens_at_most: int
    """How many further recipients a socket carries. What is beyond has a socket of its own."""
    transport: Transport
    """By what clients connect: mostly by what they choose themselves, else by a WebSocket alone."""
    poll_share: float
    """Of the clients, those that never try a WebSocket."""
    callers: int
    """How many programs repeat ``GET /v1/messages?wait_s`` and know nothing else."""
    large_audience: int
    """With more sessions on an instance a recipient has a large audience there."""
    audience_pulls_per_s: float
    """The rate to which an instance spreads the pulls of a large audience."""


class Scene:
    """The surroundings of instances and clients."""

    def __init__(self, config: Config, rng: Random, scheduler: Scheduler, trace: Trace) -> None:
        self.config = config
        self.rng = rng
        self.scheduler = scheduler
        self.trace = trace
        self.outside = scheduler.process("world")
        """The loop of everything that is neither an instance nor a client."""
        self.broker = Broker(self.outside, rng, trace, servers=config.broker_servers)
        self.store = Store(self.outside, rng, trace)
        """The coordination store."""
        kept = RestorableMailbox(self.outside.wall, Limits(group_prefixes=(GROUP_PREFIX,)))
        self.post = Post(self.outside, rng, trace, kept)
        """The mailbox."""
