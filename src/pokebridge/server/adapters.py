"""The adapters that a URL may name: the one place that knows all of them.

The scheme of the URL chooses the adapter. Its module, and with it its driver, is imported only
then.
"""

# ruff: noqa: PLC0415 - an adapter is imported when it is chosen: its driver may be missing

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn, Protocol, TypeVar

import structlog

from pokebridge.coordination.base import Coordination
from pokebridge.errors import ConfigError, MailboxError, MissingExtraError
from pokebridge.ingress.base import Source
from pokebridge.mailbox.base import Limits, Mailbox, PageReader
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.model import Mode
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.transport.base import Carrier, Transport
from pokebridge.transport.names import DEFAULT_TOPIC

if TYPE_CHECKING:  # their modules import drivers, which may be missing
    from pokebridge.tracing import Tracing
    from pokebridge.transport.google_pubsub_sweep import SweepReport

log = structlog.get_logger(__name__)

_Part = TypeVar("_Part")


class Sweeper(Protocol):
    """A transport whose engine keeps the subscriptions of an instance that was killed."""

    async def sweep(self, *, dry_run: bool = False) -> "SweepReport":
        """Find the subscriptions of the cluster that nobody reads, and delete them."""

    async def close(self) -> None:
        """Close the connection."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What an adapter may need to know beside its URL. The ``open_`` functions say what it is."""

    url: str
    instance: str = ""
    cluster: str = ""
    shard_count: int = DEFAULT_SHARD_COUNT
    mode: Mode = "fanout"
    limits: Limits | None = None
    push_timing: PushTiming | None = None
    carrier: Carrier = "filter"
    must_exist: bool = False


_Loaded = tuple[type[_Part], Callable[[], Awaitable[_Part]]]
"""The class of an adapter, and what opens the one that was chosen."""


@dataclass(frozen=True, slots=True)
class _Adapter(Generic[_Part]):
    """An adapter: how it is imported, what its URL looks like, and what installs its driver.

    ``load`` imports the adapter. ``extra`` is the extra that installs the driver. ``open_sweeper``
    is set where the engine keeps the subscriptions of an instance that was killed; the sweeper
    creates nothing in its engine.
    """

    load: Callable[[_Choice], _Loaded[_Part]]
    form: str
    extra: str | None = None
    open_sweeper: Callable[[_Choice], Awaitable[Sweeper]] | None = None


def engine_of(url: str) -> str:
    """Return the name of the engine that ``url`` leads to: its scheme, without regard to TLS."""
    scheme = url.partition("://")[0]
    return {"tls": "nats", "rediss": "redis", "postgres": "postgresql"}.get(scheme, scheme)


def transport_class(url: str) -> type[Transport]:
    """The class of the transport that ``url`` names; it tells what that transport can do.

    Raises:
        ConfigError: no transport has this scheme.
        MissingExtraError: its driver is not installed.
    """
    return _load("transport", _TRANSPORTS, _Choice(url))[0]


def mailbox_class(url: str) -> type[Mailbox]:
    """As :func:`transport_class`, for a mailbox."""
    return _load("mailbox", _MAILBOXES, _Choice(url))[0]


def coordination_class(url: str) -> type[Coordination]:
    """As :func:`transport_class`, for a coordination store."""
    return _load("coordination", _COORDINATIONS, _Choice(url))[0]


async def open_transport(
    url: str,
    *,
    instance: str,
    cluster: str,
    carrier: Carrier = "filter",
    shard_count: int = DEFAULT_SHARD_COUNT,
) -> Transport:
    """The transport that ``url`` names, for ``instance`` of ``cluster``.

    ``shard_count`` matters where everything is a subscription for each shard: on Google Pub/Sub
    with the ``carrier`` ``topic``, and on a Redis Cluster.

    Raises:
        ConfigError: no transport has this scheme, or its URLs have another form.
        MissingExtraError: its driver is not installed.
        TransportError: it can't be reached.
    """
    choice = _Choice(url, instance, cluster, shard_count, carrier=carrier)
    return await _open("transport", _TRANSPORTS, choice)


def open_tracing(instance: str) -> "Tracing":
    """OpenTelemetry traces of ``instance``; to be called before the event loop runs.

    Raises MissingExtraError: its library is not installed.
    """
    try:
        from pokebridge import tracing
    except ImportError as error:
        raise MissingExtraError("tracing", "otel") from error
    return tracing.open_tracing(instance)


async def open_sweeper(url: str, *, instance: str, cluster: str) -> Sweeper | None:
    """The transport that ``url`` names, to delete what killed instances left in its engine.

    It creates nothing there. ``None``, and nothing is imported or connected to, when that engine
    keeps nothing of an instance that is gone. Raises as :func:`open_transport` does.
    """
    adapter = _adapter("transport", _TRANSPORTS, url)
    if adapter.open_sweeper is None:
        return None
    with _named_extra(url, adapter.extra):
        return await adapter.open_sweeper(_Choice(url, instance, cluster))


async def open_mailbox(
    url: str,
    limits: Limits | None = None,
    push_timing: PushTiming | None = None,
    *,
    must_exist: bool = False,
) -> Mailbox:
    """The mailbox that ``url`` names, with ``limits`` for each recipient, or the default ones.

    With a ``push_timing`` it owes pushes. With ``must_exist`` a missing file is an error, where
    otherwise it is created.

    Raises:
        ConfigError: no mailbox has this scheme, or its URLs have another form.
        MissingExtraError: its driver is not installed.
        MailboxError: it can't be reached.
    """
    choice = _Choice(url, limits=limits, push_timing=push_timing, must_exist=must_exist)
    return await _open("mailbox", _MAILBOXES, choice)


async def open_reader(url: str) -> PageReader | None:
    """A reader of the file that a hub has open; ``None`` for a mailbox that is no file."""
    path = url.removeprefix("sqlite:///")
    if path == url:
        return None
    from pokebridge.mailbox.sqlite_pages import SqliteReader

    with suppress(MailboxError):  # the hub knows why, and says so
        return await SqliteReader.open(path)
    return None


async def claim_file(url: str, claims: AsyncExitStack) -> None:
    """Claim the mailbox's file until ``claims`` ends. Warn if another instance has claimed it.

    For instances with the transport memory://, of which none pokes another's clients.
    """
    path = url.removeprefix("sqlite:///")
    if path == url:
        return
    from pokebridge.mailbox.sqlite_file import claimed

    with suppress(OSError):  # the mailbox works without a claim
        if not await asyncio.to_thread(claims.enter_context, claimed(Path(path))):
            meaning = "another instance uses it, and memory:// does not poke that one's clients"
            log.warning("mailbox_file_shared", path=path, meaning=meaning)


async def open_ingress(url: str, *, cluster: str) -> Source:
    """The queue that ``url`` names, read by all processors of ``cluster`` together.

    Raises:
        ConfigError: no queue has this scheme, or its URLs have another form.
        MissingExtraError: its driver is not installed.
    """
    return await _open("ingress", _INGRESSES, _Choice(url, cluster=cluster))


async def open_coordination(
    url: str, *, instance: str, cluster: str, shard_count: int, mode: Mode
) -> Coordination:
    """The coordination store that ``url`` names, for ``instance`` of ``cluster``.

    ``shard_count`` and ``mode`` are for ``static://``, which computes the shard map instead of
    keeping one.

    Raises:
        ConfigError: no store has this scheme, or its URLs have another form.
        MissingExtraError: its driver is not installed.
        CoordinationError: it can't be reached.
    """
    choice = _Choice(url, instance, cluster, shard_count, mode)
    return await _open("coordination", _COORDINATIONS, choice)


async def _open(part: str, adapters: Mapping[str, _Adapter[_Part]], choice: _Choice) -> _Part:
    _, open_it = _load(part, adapters, choice)
    return await open_it()


def _load(part: str, adapters: Mapping[str, _Adapter[_Part]], choice: _Choice) -> _Loaded[_Part]:
    adapter = _adapter(part, adapters, choice.url)
    with _named_extra(choice.url, adapter.extra):
        return adapter.load(choice)


@contextmanager
def _named_extra(url: str, extra: str | None) -> Iterator[None]:
    """Turn the ImportError of a missing driver into an error that names the extra to install."""
    try:
        yield
    except ImportError as error:
        if extra is None or (error.name or "").startswith("pokebridge"):
            raise
        raise MissingExtraError(f"{url.partition('://')[0]}://", extra) from error


def _adapter(part: str, adapters: Mapping[str, _Adapter[_Part]], url: str) -> _Adapter[_Part]:
    scheme, separator, _ = url.partition("://")
    adapter = adapters.get(scheme)
    if adapter is None or not separator:
        _refuse(part, " or ".join({adapter.form: None for adapter in adapters.values()}))
    return adapter


def _refuse(part: str, form: str) -> NoReturn:
    # The URL itself is left out: it may carry a password.
    raise ConfigError(f"{part}: must be {form}")


# --- the adapters ---------------------------------------------------------------------------------


async def _in_memory(part: str, choice: _Choice, make: Callable[[], _Part]) -> _Part:
    if choice.url != "memory://":
        _refuse(part, "memory:// and nothing behind it")
    return make()


def _memory_transport(choice: _Choice) -> _Loaded[Transport]:
    from pokebridge.transport.memory import MemoryTransport

    return MemoryTransport, lambda: _in_memory("transport", choice, MemoryTransport)


def _nats_transport(choice: _Choice) -> _Loaded[Transport]:
    from pokebridge.transport.nats import NatsTransport

    return NatsTransport, lambda: NatsTransport.connect(
        choice.url, cluster=choice.cluster, instance=choice.instance
    )


def _redis_transport(choice: _Choice) -> _Loaded[Transport]:
    from pokebridge.transport.redis import RedisTransport

    return RedisTransport, lambda: RedisTransport.connect(
        choice.url, cluster=choice.cluster, instance=choice.instance, shard_count=choice.shard_count
    )


def _google_transport(choice: _Choice) -> _Loaded[Transport]:
    from pokebridge.transport.google_pubsub import GooglePubSubTransport

    project, topic = _project_and_topic(choice.url)
    return GooglePubSubTransport, lambda: GooglePubSubTransport.connect(
        project,
        topic,
        instance=choice.instance,
        cluster=choice.cluster,
        carrier=choice.carrier,
        shard_count=choice.shard_count,
    )


async def _google_sweeper(choice: _Choice) -> Sweeper:
    from pokebridge.transport.google_pubsub import GooglePubSubTransport

    project, topic = _project_and_topic(choice.url)
    return await GooglePubSubTransport.connect(
        project, topic, instance=choice.instance, cluster=choice.cluster, create_topic=False
    )


def _project_and_topic(url: str) -> tuple[str, str]:
    project, _, topic = url.removeprefix("pubsub://").partition("/")
    return project, topic or DEFAULT_TOPIC


def _memory_mailbox(choice: _Choice) -> _Loaded[Mailbox]:
    from pokebridge.mailbox.memory import MemoryMailbox

    def make() -> MemoryMailbox:
        return MemoryMailbox(limits=choice.limits, push_timing=choice.push_timing)

    return MemoryMailbox, lambda: _in_memory("mailbox", choice, make)


def _sqlite_mailbox(choice: _Choice) -> _Loaded[Mailbox]:
    from pokebridge.mailbox.sqlite import SqliteMailbox

    async def open_it() -> SqliteMailbox:
        path = choice.url.removeprefix("sqlite:///")
        if path in {choice.url, "", ":memory:"}:
            _refuse("mailbox", "sqlite:///FILE, or sqlite:////FILE for an absolute path")
        if choice.must_exist and not await asyncio.to_thread(Path(path).is_file):
            raise ConfigError(
                f"mailbox: there is no file {path}; name the instance's own with --mailbox, as in"
                " --mailbox sqlite:///var/pokebridge.db after `make run`"
            )
        return await SqliteMailbox.open(path, limits=choice.limits, push_timing=choice.push_timing)

    return SqliteMailbox, open_it


def _postgres_mailbox(choice: _Choice) -> _Loaded[Mailbox]:
    from pokebridge.mailbox.postgres import PostgresMailbox

    return PostgresMailbox, lambda: PostgresMailbox.open(
        choice.url, limits=choice.limits, push_timing=choice.push_timing
    )


def _memory_coordination(choice: _Choice) -> _Loaded[Coordination]:
    from pokebridge.coordination.memory import MemoryCoordination

    return MemoryCoordination, lambda: _in_memory("coordination", choice, MemoryCoordination)


def _static_coordination(choice: _Choice) -> _Loaded[Coordination]:
    from pokebridge.coordination.static import StaticCoordination

    return StaticCoordination, lambda: StaticCoordination.connect(
        choice.url, instance=choice.instance, shard_count=choice.shard_count, mode=choice.mode
    )


def _postgres_coordination(choice: _Choice) -> _Loaded[Coordination]:
    from pokebridge.coordination.postgres import PostgresCoordination

    return PostgresCoordination, lambda: PostgresCoordination.connect(
        choice.url, cluster=choice.cluster
    )


def _nats_coordination(choice: _Choice) -> _Loaded[Coordination]:
    from pokebridge.coordination.nats import NatsCoordination

    return NatsCoordination, lambda: NatsCoordination.connect(choice.url, cluster=choice.cluster)


def _redis_coordination(choice: _Choice) -> _Loaded[Coordination]:
    from pokebridge.coordination.redis import RedisCoordination

    return RedisCoordination, lambda: RedisCoordination.connect(choice.url, cluster=choice.cluster)


def _nats_ingress(choice: _Choice) -> _Loaded[Source]:
    from pokebridge.ingress.nats import NatsSource

    async def open_it() -> NatsSource:
        return NatsSource(choice.url, cluster=choice.cluster)

    return NatsSource, open_it


def _google_ingress(choice: _Choice) -> _Loaded[Source]:
    from pokebridge.ingress.google_pubsub import GooglePubSubSource

    return GooglePubSubSource, lambda: GooglePubSubSource.connect(choice.url)


_NATS = _Adapter(_nats_transport, "nats://HOST:PORT", "nats")
_REDIS = _Adapter(_redis_transport, "redis://HOST:PORT/DB", "redis")
_NATS_STORE = _Adapter(_nats_coordination, "nats://HOST:PORT", "nats")
_REDIS_STORE = _Adapter(_redis_coordination, "redis://HOST:PORT/DB", "redis")
_POSTGRES_STORE = _Adapter(
    _postgres_coordination, "postgresql://USER@HOST:PORT/DATABASE", "postgres"
)

_TRANSPORTS: Mapping[str, _Adapter[Transport]] = {
    "memory": _Adapter(_memory_transport, "memory://"),
    "nats": _NATS,
    "tls": _NATS,  # NATS over TLS, as its own clients spell it
    "redis": _REDIS,
    "rediss": _REDIS,
    "pubsub": _Adapter(_google_transport, "pubsub://PROJECT/TOPIC", "pubsub", _google_sweeper),
}
_COORDINATIONS: Mapping[str, _Adapter[Coordination]] = {
    "memory": _Adapter(_memory_coordination, "memory://"),
    "static": _Adapter(_static_coordination, "static://?ordinal=N&replicas=M"),
    "postgresql": _POSTGRES_STORE,
    "postgres": _POSTGRES_STORE,
    "nats": _NATS_STORE,
    "tls": _NATS_STORE,
    "redis": _REDIS_STORE,
    "rediss": _REDIS_STORE,
}
_POSTGRES_MAILBOX = _Adapter(_postgres_mailbox, "postgresql://USER@HOST:PORT/DATABASE", "postgres")
_MAILBOXES: Mapping[str, _Adapter[Mailbox]] = {
    "sqlite": _Adapter(_sqlite_mailbox, "sqlite:///FILE"),
    "postgresql": _POSTGRES_MAILBOX,
    "postgres": _POSTGRES_MAILBOX,
    "memory": _Adapter(_memory_mailbox, "memory://"),
}
_NATS_INGRESS = _Adapter(_nats_ingress, "nats://HOST:PORT/STREAM/SUBJECT", "nats")
_INGRESSES: Mapping[str, _Adapter[Source]] = {
    "nats": _NATS_INGRESS,
    "tls": _NATS_INGRESS,
    "pubsub": _Adapter(_google_ingress, "pubsub://PROJECT/SUBSCRIPTION", "pubsub"),
}
