"""The HTTP API's bodies and queries as types (protocol.md section 4).

One struct both decodes a request and describes it in OpenAPI, so that the description can't drift
from the code.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from pokebridge.http_publisher import MAX_RECIPIENTS_PER_REQUEST
from pokebridge.model import (
    DEFAULT_DEVICE,
    MAX_DEVICE_LENGTH,
    MAX_VERSION,
    Mode,
)
from pokebridge.submission import MessageId, Recipient, visible_ascii
from pokebridge.wire import Listen, Unlisten

MAX_PAGE = 500
DEFAULT_PAGE = 50
MAX_TOKEN_TTL_S = 31_536_000
MAX_SENT_FRAMES = 100
MAX_WAIT_S = 60
"""Above this, proxies would cut a call that waits."""


Device = Annotated[
    str, visible_ascii(MAX_DEVICE_LENGTH, "phone", "One of the recipient's devices.")
]
Cursor = Annotated[int, Meta(ge=0, le=MAX_VERSION)]


class _Request(Struct, forbid_unknown_fields=True):
    pass


class PokeRequest(_Request):
    """Whom to poke: one `recipient`, or several `recipients`."""

    recipient: Recipient | UnsetType = UNSET
    recipients: (
        Annotated[list[Recipient], Meta(max_length=MAX_RECIPIENTS_PER_REQUEST)] | UnsetType
    ) = UNSET


class PokesAccepted(Struct):
    """How many pokes were accepted."""

    accepted: Annotated[int, Meta(ge=0)]


class Sent(Struct):
    """The message is durable under this `id` and `version`."""

    id: MessageId
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]


WaitS = Annotated[
    float,
    Meta(
        ge=0,
        le=MAX_WAIT_S,
        description="For how many seconds to wait while there is nothing new.",
    ),
]


class PullQuery(Struct):
    """What to pull."""

    after: Annotated[Cursor, Meta(description="Return messages above this version.")] = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Maximum number of messages.")] = (
        DEFAULT_PAGE
    )
    device: (
        Annotated[
            Device,
            Meta(description="Registers the device: messages are then kept until it acks them."),
        ]
        | UnsetType
    ) = UNSET
    wait_s: WaitS = 0


class PollQuery(Struct):
    """The session, and how long to wait for its frames. Without `session` a new one begins."""

    session: Annotated[str, Meta(max_length=64, examples=["c0ffee"])] | UnsetType = UNSET
    wait_s: WaitS = 0
    device: Device | UnsetType = UNSET
    moved: Annotated[bool, Meta(description="The client was sent here by a `move`.")] = False


class FramesQuery(Struct):
    """The session whose client sends frames."""

    session: Annotated[str, Meta(max_length=64, examples=["c0ffee"])]


class SentFrames(_Request):
    """The frames that the client of a session without a WebSocket sends."""

    frames: Annotated[list[Listen | Unlisten], Meta(max_length=MAX_SENT_FRAMES)]


class Close(Struct):
    """The end of a session: the close code that a WebSocket would have got, and the reason."""

    code: int
    reason: str


class Polled(Struct, omit_defaults=True):
    """The frames that a WebSocket would have got since the last call. With `close` it has ended."""

    session: str
    frames: Annotated[list[Raw], Meta(extra_json_schema={"items": {"type": "object"}})]
    close: Close | None = None


class PulledMessage(Struct):
    """A message in the caller's mailbox."""

    id: MessageId
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]
    sender: Recipient
    body: Raw
    sent_at: Annotated[
        str,
        Meta(
            description="UTC, RFC 3339.",
            extra_json_schema={"format": "date-time", "example": "2026-11-24T05:30:00.123Z"},
        ),
    ]


class Pulled(Struct):
    """Messages in order. `version` is the next `after`. With `more`, pull again at once."""

    messages: list[PulledMessage]
    version: Cursor
    more: bool


class DisconnectQuery(Struct):
    """Whether the recipient's tokens are revoked as well."""

    revoke: Annotated[
        bool,
        Meta(
            description="Also refuse, everywhere, the recipient's tokens that were issued before"
            " now (`revoke_for_s`)."
        ),
    ] = False


class AckQuery(Struct):
    """The device that acks."""

    device: Device | UnsetType = UNSET


class AckRequest(_Request):
    """This device has everything up to `version`."""

    version: Cursor
    device: (
        Annotated[
            Device,
            Meta(description=f"Instead of the query parameter; neither: `{DEFAULT_DEVICE}`."),
        ]
        | UnsetType
    ) = UNSET


class ConnectInfo(Struct):
    """Where the caller should connect: the owner of its shard."""

    url: Annotated[str, Meta(extra_json_schema={"example": "wss://a.example/v1/connect"})]
    shard: Annotated[int, Meta(ge=0)]
    instance: str


Share = Annotated[float, Meta(ge=0, le=1)]


class Worker(Struct):
    """One worker process of an instance. It has `sessions` open, and was started `starts` times."""

    number: int
    sessions: int = 0
    starts: int = 0
    memory_bytes: int = 0


class Instance(Struct):
    """One member of the cluster, as of a few seconds ago.

    It has `sessions` open and owns `shards`; `interest` are the shards of its sessions. It has
    applied the shard map `epoch`, and is `settled` once it holds exactly what that map asks for.
    """

    id: str
    url: str
    state: Annotated[str, Meta(description="`active`, `draining` or `deaf` (its transport fails).")]
    sessions: Annotated[int, Meta(ge=0)]
    shards: list[int]
    weight: float = 1.0
    joined_at_ms: Annotated[int, Meta(description="Unix time.")] = 0
    epoch: int = 0
    settled: bool = True
    subscriptions: int = 0
    interest: Sequence[int] = ()
    messages_per_s: float = 0.0
    owned_per_s: Annotated[float, Meta(description="Those for shards that the instance owns.")] = (
        0.0
    )
    pokes_per_s: Annotated[float, Meta(description="Poke frames written to sockets.")] = 0.0
    noise_ratio: Annotated[Share, Meta(description="CPU time spent on others' pokes.")] = 0.0
    untagged_share: Annotated[Share, Meta(description="Share of the signals without a shard.")] = (
        0.0
    )
    gaps: int = 0
    lost: Annotated[int, Meta(description="Lost pokes that verification sent again.")] = 0
    doubt_s: Annotated[
        float,
        Meta(
            description="Seconds in which pokes may have been lost; every session is poked after."
        ),
    ] = 0.0
    pulls_per_s: float = 0.0
    pull_p99_ms: Annotated[
        float, Meta(description="99th percentile of the time to answer a pull.")
    ] = 0.0
    cpu_share: Annotated[float, Meta(description="1 is one core.")] = 0.0
    memory_bytes: int = 0
    workers: Annotated[
        Sequence[Worker], Meta(description="Empty where one process does everything.")
    ] = ()
    version: Annotated[
        str, Meta(description="The release that it runs; empty when it is too old to say.")
    ] = ""


class Traffic(Struct):
    """The load and the red line. `global_ops_per_s` counts a message once an instance."""

    messages_per_s: Annotated[float, Meta(description="Published.")]
    global_ops_per_s: float
    red_line: float
    noise_ratio: Annotated[float, Meta(description="CPU time spent on others' pokes, 0 to 1.")]
    over_red_line: bool


class Cluster(Struct):
    """The cluster as the instance `seen_by` sees it; `events` counts what has happened."""

    mode: Mode
    epoch: int
    shard_count: int
    instances: list[Instance]
    traffic: Traffic
    engine: Annotated[
        str, Meta(description="What carries the pokes: `memory`, `nats`, `redis` or `pubsub`.")
    ] = ""
    seen_by: str = ""
    events: int = 0
    trouble: Annotated[
        str, Meta(description="What `seen_by` can't reach; empty when all is well.")
    ] = ""
    name: str = ""


class Event(Struct):
    """Something that happened to the cluster. Every instance that saw it gives it the same `id`."""

    id: str
    at_ms: Annotated[int, Meta(description="Unix time.")]
    kind: Annotated[
        str,
        Meta(
            description="`joined`, `left`, `died`, `draining`, `gap`, `moved`, `migrating` or"
            " `migrated`."
        ),
    ]
    instance: Annotated[
        str, Meta(description="The instance that it is about; empty for the whole cluster.")
    ]
    text: str


class Events(Struct):
    """The newest events, oldest first, of the `count` that `seen_by` has seen since its start."""

    seen_by: str
    count: int
    events: list[Event]


class Session(Struct):
    """An open WebSocket of a recipient."""

    instance: str
    device: str
    address: Annotated[
        str,
        Meta(description="The client's address; empty when sessions are not limited by address."),
    ]
    since_ms: Annotated[int, Meta(description="When it began, as Unix time; whole seconds.")]
    told: Annotated[
        int | None,
        Meta(description="The newest version that it was poked for; null when none was named."),
    ]


class KnownDevice(Struct):
    """A device that the mailbox knows. `behind` counts the versions that it has not acked."""

    device: str
    acked: int
    behind: int


class RecipientMailbox(Struct):
    """What the mailbox keeps for a recipient."""

    head: Annotated[int, Meta(description="The newest version; 0 when there is none.")]
    messages: int
    bytes: Annotated[int, Meta(description="Of their bodies.")]
    poke_owed_since_ms: Annotated[
        int | None, Meta(description="Since when a poke is owed, as Unix time; null when none is.")
    ]
    devices: list[KnownDevice]


class RecipientState(Struct):
    """Where a recipient is connected, and what is owed to it.

    The instances in `unanswered` did not say whether they have sessions of it. `mailbox` is null
    when the instance has none.
    """

    recipient: str
    sessions: list[Session]
    unanswered: list[str]
    mailbox: RecipientMailbox | None


class MailboxTotals(Struct):
    """All that the mailbox holds.

    Counting reads the whole store, so it is done at most every ten seconds: `counted_at_ms` says
    when. Times are Unix time, and null when there is nothing.
    """

    counted_at_ms: int
    recipients: Annotated[int, Meta(description="Those that ever had a message.")]
    messages: int
    bytes: Annotated[int, Meta(description="Of the messages' bodies.")]
    devices: int
    oldest_message_ms: int | None
    pokes_owed: Annotated[int, Meta(description="Recipients whose poke is not confirmed.")]
    poke_owed_since_ms: Annotated[int | None, Meta(description="Of the oldest one.")]
    pushes_owed: int
    pushes_given_up: int


class Watch(Struct):
    """For how many seconds the caller is poked when there is something new to see."""

    for_s: float


class ModeRequest(_Request):
    """The mode to migrate to. With `force`, also when many signals carry no shard."""

    mode: Mode
    force: bool = False


class DrainRequest(_Request):
    """The instance that gives up its shards and sessions."""

    instance: str


class TokenRequest(_Request):
    """What the token grants, and to whom."""

    sub: Recipient
    scope: Annotated[str, Meta(description="Space-separated.")] = "send poke admin"
    ttl_s: Annotated[float, Meta(ge=1, le=MAX_TOKEN_TTL_S)] = 3600


class Token(Struct):
    """A signed token."""

    token: str


class Health(Struct):
    """All is well."""

    status: Literal["ok"] = "ok"
