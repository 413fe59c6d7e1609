"""From URLs to the parts that they choose: the one place that knows every adapter.

An adapter's module, and with it its driver, is imported when a URL asks for it and not before.
"""

# ruff: noqa: PLC0415 - an adapter is imported when it is chosen, since its driver may be missing

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from pokebridge.coordination.base import Coordination
from pokebridge.errors import ConfigError, MissingExtraError
from pokebridge.ingress.base import Source
from pokebridge.mailbox.base import Limits, Mailbox
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.model import Mode
from pokebridge.sharding import DEFAULT_SHARD_COUNT
from pokebridge.transport.base import Carrier, Transport

if TYPE_CHECKING:
    from pokebridge.tracing import Tracing

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a part may need to know beside its URL."""

    url: str
    instance: str = ""
    cluster: str = ""
    shard_count: int = DEFAULT_SHARD_COUNT
    mode: Mode = "fanout"
    limits: Limits | None = None
    push_timing: PushTiming | None = None
    carrier: Carrier = "filter"
    creates: bool = True


@dataclass(frozen=True, slots=True)
class _Adapter(Generic[_Part]):
    """How to open a part, what its URL looks like, and the extra that installs its driver.

    ``leaves_orphans``: its engine keeps what an instance held that was killed.
    """

    open: Callable[[_Choice], Awaitable[_Part]]
    form: str
    extra: str | None = None
    leaves_orphans: bool = False


async def open_transport(
    url: str,
    *,
    instance: str,
    cluster: str,
    carrier: Carrier = "filter",
    shard_count: int = DEFAULT_SHARD_COUNT,
) -> Transport:
    """The transport that ``url`` chooses, for ``instance`` of ``cluster``.

    ``shard_count`` matters where everything is a subscription for each shard: on Google Pub/Sub
    with the ``carrier`` ``topic``, and on a Redis Cluster.

    Raises:
        ConfigError: there is none with this scheme, or the URL is not one of its.
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


async def open_for_janitor(url: str, *, instance: str, cluster: str) -> Transport | None:
    """The transport that ``url`` chooses, which then creates nothing in its engine.

    ``None``, and nothing is imported or connected to, when that engine keeps nothing of an
    instance that is gone. Raises as :func:`open_transport` does.
    """
    if not _adapter("transport", _TRANSPORTS, url).leaves_orphans:
        return None
    choice = _Choice(url, instance, cluster, creates=False)
    return await _open("transport", _TRANSPORTS, choice)


async def open_mailbox(
    url: str, limits: Limits | None = None, push_timing: PushTiming | None = None
) -> Mailbox:
    """The mailbox that ``url`` chooses, with ``limits`` for each recipient, or the usual ones.

    With a ``push_timing`` it owes pushes.

    Raises:
        ConfigError: there is none with this scheme, or the URL is not one of its.
        MissingExtraError: its driver is not installed.
        MailboxError: it can't be reached.
    """
    return await _open("mailbox", _MAILBOXES, _Choice(url, limits=limits, push_timing=push_timing))


async def open_ingress(url: str, *, cluster: str) -> Source:
    """The queue that ``url`` chooses, read by all processors of ``cluster`` together.

    Raises:
        ConfigError: there is none with this scheme, or the URL is not one of its.
        MissingExtraError: its driver is not installed.
    """
    return await _open("ingress", _INGRESSES, _Choice(url, cluster=cluster))


async def open_coordination(
    url: str, *, instance: str, cluster: str, shard_count: int, mode: Mode
) -> Coordination:
    """The coordination store that ``url`` chooses, for ``instance`` of ``cluster``.

    A real store needs no more than that; ``static://`` computes the map of ``shard_count`` shards
    in ``mode`` instead of keeping one.

    Raises:
        ConfigError: there is none with this scheme, or the URL is not one of its.
        MissingExtraError: its driver is not installed.
        CoordinationError: it can't be reached.
    """
    choice = _Choice(url, instance, cluster, shard_count, mode)
    return await _open("coordination", _COORDINATIONS, choice)


async def _open(part: str, adapters: Mapping[str, _Adapter[_Part]], choice: _Choice) -> _Part:
    adapter = _adapter(part, adapters, choice.url)
    try:
        return await adapter.open(choice)
    except ImportError as error:
        if adapter.extra is None or (error.name or "").startswith("pokebridge"):
            raise
        scheme = choice.url.partition("://")[0]
        raise MissingExtraError(f"{scheme}://", adapter.extra) from error


def _adapter(part: str, adapters: Mapping[str, _Adapter[_Part]], url: str) -> _Adapter[_Part]:
    scheme, separator, _ = url.partition("://")
    adapter = adapters.get(scheme)
    if adapter is None or not separator:
        _refuse(part, " or ".join({adapter.form: None for adapter in adapters.values()}))
    return adapter


def _refuse(part: str, form: str) -> NoReturn:
    # The URL itself is left out: it may carry a password.
    raise ConfigError(f"{part}: must be {form}")


async def _memory_transport(choice: _Choice) -> Transport:
    from pokebridge.transport.memory import MemoryTransport

    if choice.url != "memory://":
        _refuse("transport", "memory:// and nothing behind it")
    return MemoryTransport()


async def _memory_mailbox(choice: _Choice) -> Mailbox:
    from pokebridge.mailbox.memory import MemoryMailbox

    if choice.url != "memory://":
        _refuse("mailbox", "memory:// and nothing behind it")
    return MemoryMailbox(limits=choice.limits, push_timing=choice.push_timing)


async def _memory_coordination(choice: _Choice) -> Coordination:
    from pokebridge.coordination.memory import MemoryCoordination

    if choice.url != "memory://":
        _refuse("coordination", "memory:// and nothing behind it")
    return MemoryCoordination()


async def _static_coordination(choice: _Choice) -> Coordination:
    from pokebridge.coordination.static import StaticCoordination

    return await StaticCoordination.connect(
        choice.url,
        instance=choice.instance,
        shard_count=choice.shard_count,
        mode=choice.mode,
    )


async def _postgres_coordination(choice: _Choice) -> Coordination:
    from pokebridge.coordination.postgres import PostgresCoordination

    return await PostgresCoordination.connect(choice.url, cluster=choice.cluster)


async def _nats_coordination(choice: _Choice) -> Coordination:
    from pokebridge.coordination.nats import NatsCoordination

    return await NatsCoordination.connect(choice.url, cluster=choice.cluster)


async def _redis_coordination(choice: _Choice) -> Coordination:
    from pokebridge.coordination.redis import RedisCoordination

    return await RedisCoordination.connect(choice.url, cluster=choice.cluster)


async def _sqlite_mailbox(choice: _Choice) -> Mailbox:
    from pokebridge.mailbox.sqlite import SqliteMailbox

    path = choice.url.removeprefix("sqlite:///")
    if path in {choice.url, "", ":memory:"}:
        _refuse("mailbox", "sqlite:///FILE, or sqlite:////FILE for an absolute path")
    return await SqliteMailbox.open(path, limits=choice.limits, push_timing=choice.push_timing)


async def _postgres_mailbox(choice: _Choice) -> Mailbox:
    from pokebridge.mailbox.postgres import PostgresMailbox

    return await PostgresMailbox.open(
        choice.url, limits=choice.limits, push_timing=choice.push_timing
    )


async def _nats_ingress(choice: _Choice) -> Source:
    from pokebridge.ingress.nats import NatsSource

    return NatsSource(choice.url, cluster=choice.cluster)


async def _google_ingress(choice: _Choice) -> Source:
    from pokebridge.ingress.google_pubsub import GooglePubSubSource

    return await GooglePubSubSource.connect(choice.url)


async def _nats_transport(choice: _Choice) -> Transport:
    from pokebridge.transport.nats import NatsTransport

    return await NatsTransport.connect(choice.url, cluster=choice.cluster, instance=choice.instance)


async def _redis_transport(choice: _Choice) -> Transport:
    from pokebridge.transport.redis import RedisTransport

    return await RedisTransport.connect(
        choice.url,
        cluster=choice.cluster,
        instance=choice.instance,
        shard_count=choice.shard_count,
    )


async def _google_transport(choice: _Choice) -> Transport:
    from pokebridge.transport.google_pubsub import DEFAULT_TOPIC, GooglePubSubTransport

    project, _, topic = choice.url.removeprefix("pubsub://").partition("/")
    return await GooglePubSubTransport.connect(
        project,
        topic or DEFAULT_TOPIC,
        instance=choice.instance,
        cluster=choice.cluster,
        carrier=choice.carrier,
        shard_count=choice.shard_count,
        create_topic=choice.creates,
    )


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
    "pubsub": _Adapter(_google_transport, "pubsub://PROJECT/TOPIC", "pubsub", leaves_orphans=True),
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
