"""The settings of a gateway."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from pokebridge.gateway.handshake import Network
from pokebridge.gateway.subscriptions import SubscriptionTiming
from pokebridge.model import Mode
from pokebridge.placement import PlacementRules
from pokebridge.session import Timing
from pokebridge.sharding import DEFAULT_SHARD_COUNT


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The settings of a gateway. A limit of ``None`` is no limit."""

    instance: str
    """This instance's id."""
    max_sessions_per_recipient: int
    """A session beyond this limit replaces the recipient's oldest one."""
    group_prefixes: tuple[str, ...] = ()
    """The prefixes of recipients that are groups. A group may have any number of sessions."""
    audience_pulls_per_s: float = 1000.0
    """The rate to which the pulls after a poke to a large audience are spread."""
    verify_every_s: float
    """How often each session is compared with its recipient's mailbox."""
    allowed_origins: frozenset[str] | None = frozenset()
    """The values of ``Origin`` that are accepted. ``None`` accepts every Origin."""
    trusted_proxies: Sequence[Network] = ()
    """The proxies whose forwarding fields are believed."""
    path_prefix: str = ""
    """The beginning of every path that clients use, which a proxy may have removed."""
    max_sockets: int | None = None
    """The most sessions and HTTP connections together."""
    max_connections_per_address: int | None = None
    """The most HTTP connections from one client address."""
    max_sessions: int | None = None
    max_sessions_per_address: int | None = None
    handshakes_per_s: float | None = None
    timing: Timing = field(default_factory=Timing)
    """The deadlines of a session."""
    subscription_timing: SubscriptionTiming = field(default_factory=SubscriptionTiming)
    shard_count: int = DEFAULT_SHARD_COUNT
    cluster: str = "default"
    """The cluster's name. It is compared with what other instances have, and so are ``carrier``,
    ``assignment``, ``shard_count`` and ``group_prefixes``."""
    carrier: str = "filter"
    assignment: str | None = "coordinator"
    """``None`` if the instance neither owns nor assigns shards."""
    mode: Mode = "fanout"
    """The mode until the first shard map arrives."""
    deaf_after_s: float = 5.0
    """When the transport has been in doubt for this long, the instance is deaf."""
    placement: PlacementRules = field(default_factory=PlacementRules)
    max_session_s: float = inf
    """The longest life of a session. Each session gets a random share of it, 80 to 100 %, so that
    sessions that began together do not end together."""
    moves_per_s: float = 200.0
    """How many sessions a second follow their shard to its new owner."""
    move_delay_s: float = 2.0
    """How long sessions wait before they follow, so that the new owner can prove its
    subscription."""
