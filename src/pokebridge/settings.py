"""The settings of an instance, and how they are read (protocol.md section 6).

The attribute docstrings are the documentation of the settings: ``pokebridge serve --help`` and
docs/settings.md show them.
"""

import base64
import difflib
import inspect
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from pokebridge.border import describe_unforeseen
from pokebridge.cores import usable_cores
from pokebridge.errors import ConfigError
from pokebridge.mailbox.base import Limits
from pokebridge.mailbox.pushes import PushTiming
from pokebridge.model import MAX_VERSION, Mode
from pokebridge.red_line import MIGRATE_RULES, RED_LINE_OPS_PER_S
from pokebridge.session import Timing
from pokebridge.setting_types import (
    CENTURY_S,
    WEBHOOK_SECRET,
    AdvertiseUrl,
    Claim,
    Factor,
    GroupPrefix,
    Host,
    HttpUrl,
    IngressUrl,
    Limit,
    Name,
    Network,
    Origin,
    PartUrl,
    PathPrefix,
    Seconds,
    Secret,
    WebhookSecret,
    is_loopback,
    split_list,
    unless_dev,
)
from pokebridge.sharding import DEFAULT_SHARD_COUNT, MAX_SHARD_COUNT
from pokebridge.submission import MAX_BODY_BYTES
from pokebridge.transport.base import Carrier

__all__ = ["Settings", "load_settings"]

ENV_PREFIX = "POKEBRIDGE_"
# Variables with our prefix that are not settings: the file's path, and what the commands read.
_OTHER_VARIABLES = frozenset({"config", "url", "token"})
# Variables that Kubernetes sets in every container for a Service pokebridge or pokebridge-….
_SERVICE_LINK = re.compile(r"(.+_)?(SERVICE_(HOST|PORT(_.+)?)|PORT_\d+_(TCP|UDP|SCTP)(_.+)?)")
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.+")

# The parts state their defaults themselves, and these settings take them over.
_LIMITS, _PUSH_TIMING, _SESSION_TIMING = Limits(), PushTiming(), Timing()
_DAY_S = 24 * 3600

_Role = Literal["gateway", "api", "processor", "coordinator"]
_ALL_ROLES: frozenset[_Role] = frozenset(get_args(_Role))

_TITLE_OR_FIELD = re.compile(r"^    (?:# --- (.+) ---$|(\w+): )", re.MULTILINE)


class Settings(BaseModel):
    """The settings of one instance. They are checked when they are made, and immutable."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        # Defaults such as the limits depend on `dev`, which is therefore the first field.
        validate_default=True,
    )

    # --- Instance ---

    dev: bool = False
    """Development mode. The instance makes a random secret when none is set, accepts every origin,
    has no limits on addresses and handshakes, and serves POST /v1/dev/token, which gives anyone a
    token."""

    dev_on_network: bool = False
    """Allow dev together with a host that other machines reach. Anybody who reaches it can make
    tokens for any recipient and scope, admin included."""

    # Loopback, because an instance that nobody has looked at yet must not be open to the network;
    # a container sets 0.0.0.0.
    host: Host = "127.0.0.1"
    """Address to listen on. 0.0.0.0 or :: listens on every interface."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """TCP port to listen on. 0 picks a free port."""
    instance: Name = Field(default_factory=lambda: secrets.token_hex(4))
    """Name of this instance, unique in its cluster. Random by default."""
    roles: Annotated[frozenset[_Role], BeforeValidator(split_list), Field(min_length=1)] = (
        _ALL_ROLES
    )
    """What this instance does, separated by commas: gateway (holds the sockets), api (serves HTTP),
    processor (resends unpublished pokes, purges, pushes, reads the ingress), coordinator (can be
    elected). All four by default."""
    workers: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = 1
    """Worker processes that serve the port together, as one instance. auto: as many as there are
    cores for this process. 1: one process does everything (docs/cores.md)."""
    weight: Factor = 1.0
    """Relative capacity. An instance of weight 2 owns twice as many shards as one of weight 1."""
    advertise_url: AdvertiseUrl | None = None
    """WebSocket URL at which clients reach this instance and no other, like wss://b1.example.com.
    Needed to redirect clients to the owner of their shard. Unset: clients are not redirected."""

    path_prefix: PathPrefix = ""
    """Beginning of every path at which clients reach the instance through a proxy, like /bridge.
    The proxy may remove it or not. Unset: none, or what a trusted proxy says in
    X-Forwarded-Prefix."""

    # --- Cluster ---

    cluster: Name = "default"
    """Name of the cluster. Instances with the same name, transport and mailbox form one cluster.
    Clusters with different names do not receive each other's signals, even on one engine."""
    signal_cluster: Name | None = None
    """Name of the cluster whose subjects, channels or topics carry the signals. Unset: this
    cluster's own. Needed only to change the number of shards (docs/partitioned.md)."""
    coordination: PartUrl = "memory://"
    """Store through which instances agree who is alive and who owns which shard:
    postgresql://HOST/DB, nats://HOST:PORT (KV), redis://HOST:PORT/DB,
    static://?ordinal=0&replicas=3 (StatefulSet), or memory:// (one process)."""
    mode: Literal[Mode, "auto"] = "fanout"
    """Initial mode. fanout: every instance receives every poke. partitioned: an instance receives
    the pokes of its shards only. auto: starts as fanout, and the coordinator changes the mode when
    the load crosses the red line. Ignored once the cluster has a shard map: change the mode with
    `pokebridge cluster mode`."""
    shard_count: Annotated[int, Field(ge=1, le=MAX_SHARD_COUNT)] = DEFAULT_SHARD_COUNT
    """Number of shards. Must be the same on all instances and publishers of a cluster."""
    heard_shards: Annotated[int, Field(ge=1, le=MAX_SHARD_COUNT)] | None = None
    """How many shards to listen to in fan-out mode where each has its own channel or topic (Redis
    Cluster, carrier topic), if more than shard_count. Needed only to change the number of
    shards."""
    assignment: Literal["coordinator", "ring"] = "coordinator"
    """How shards are assigned to instances. coordinator: an elected instance assigns them and moves
    as few as possible. ring: each instance computes a hash ring. Ignored with static://, where the
    ordinal decides."""
    lease_s: Annotated[float, Field(ge=0.5, le=300, allow_inf_nan=False)] = 5
    """Seconds without a sign of life after which an instance counts as dead and its shards move."""
    deaf_after_s: Seconds = 5
    """Seconds in which the transport delivers nothing to this instance, after which it reports
    itself deaf. Two leases later its shards and sessions go to instances that still receive
    signals."""
    red_line_ops_per_s: Factor = RED_LINE_OPS_PER_S
    """The red line: deliveries per second in the whole cluster (messages per second times
    instances) above which fan-out is no longer advisable."""
    auto_over_s: Seconds = MIGRATE_RULES.over_for_s
    """With mode = auto: seconds above the red line after which the cluster is partitioned."""
    auto_under_s: Seconds = MIGRATE_RULES.under_for_s
    """With mode = auto: seconds below half of the red line after which the cluster returns to
    fan-out."""

    # --- Groups ---

    group_prefixes: Annotated[tuple[GroupPrefix, ...], BeforeValidator(split_list)] = Field(
        default_factory=lambda given: ("urn:group:",) if given.get("dev") else ()
    )
    """Prefixes of the recipients that are groups, separated by commas, like urn:room:, urn:doc:. A
    group has many readers: it may have any number of sessions, and its messages stay until they
    expire (docs/groups.md). Must be the same on all instances of a cluster. Unset: every recipient
    is a user."""
    group_ttl_s: Seconds = _LIMITS.group_ttl_s
    """Seconds after which a message for a group expires if it has no ttl_s."""
    audience_pulls_per_s: Factor = 1000
    """Most pulls per second that a poke to more than 100 sessions of this instance causes. They are
    poked again when all have had the time to pull. Raise it if your own API answers the pulls and
    can serve more."""

    # --- Transport ---

    transport: PartUrl = "memory://"
    """What carries pokes between instances: nats://HOST:PORT, redis://HOST:PORT/DB,
    pubsub://PROJECT/TOPIC, or memory:// (one process)."""
    carrier: Carrier = "filter"
    """How Google Pub/Sub separates shards. filter: one shared topic, and a filter on each
    subscription. topic: one topic for each shard. Other transports ignore it."""

    # --- Mailbox, ingress and push ---

    mailbox: PartUrl = "sqlite:///pokebridge.db"
    """Where messages are stored: sqlite:///FILE (one machine), postgresql://HOST/DB, or memory://
    (one process, lost at exit). An instance with only the role gateway stores none, but set it
    there too: the instance verifies its sessions with it and reads revocations, and keeps running
    while it is unavailable."""
    no_mailbox: bool = False
    """Store no messages. Clients pull from your own API, and your backend pokes after each
    commit."""
    max_messages_per_recipient: Annotated[int, Field(ge=1, le=MAX_VERSION)] = _LIMITS.max_messages
    """Most messages stored for one recipient. When it is reached, senders get status 507."""
    # At least the largest message fits.
    max_bytes_per_recipient: Annotated[int, Field(ge=MAX_BODY_BYTES, le=MAX_VERSION)] = (
        _LIMITS.max_bytes
    )
    """Most bytes of message bodies stored for one recipient. When it is reached, senders get
    status 507."""
    max_share_per_sender: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
    """Largest share of a recipient's quota that the messages of one sender may use, so that none
    can fill a mailbox for all others. A sender above it gets status 507. 1: no limit of its own."""
    # That a device was seen is written down once a day.
    forget_device_days: Annotated[float, Field(ge=2, le=36500, allow_inf_nan=False)] = (
        _LIMITS.forget_device_s / _DAY_S
    )
    """Days after which a device that was not seen is forgotten. Until then its recipient's messages
    are kept for it."""
    ingress: IngressUrl | None = None
    """Queue from which messages are taken, in addition to HTTP: nats://HOST:PORT/STREAM/SUBJECT
    (JetStream) or pubsub://PROJECT/SUBSCRIPTION. Unset: none."""
    push_webhook_url: HttpUrl | None = None
    """Webhook notified by a signed POST when a recipient has not pulled. Must be the same on all
    instances of a cluster. Unset: disabled."""
    push_webhook_secret: WebhookSecret | None = None
    """Secret that signs the webhook's requests (Standard Webhooks): whsec_, then 24 to 64 random
    bytes in base64."""
    push_grace_s: Seconds = _PUSH_TIMING.grace_s
    """Seconds that a message may wait for a pull before push_webhook_url is notified."""
    push_quiet_s: Seconds = _PUSH_TIMING.quiet_s
    """Seconds after a notification in which push_webhook_url is not notified of the same recipient
    again."""

    # --- Tokens and origins ---

    jwt_secret: Secret | None = Field(
        default_factory=lambda given: (
            SecretStr(secrets.token_urlsafe(48)) if given.get("dev") else None
        )
    )
    """Secret that verifies HS256 tokens, at least 32 bytes. Required unless jwks_url is set."""
    jwt_previous_secret: Secret | None = None
    """Previous secret, still accepted while a new one is rolled out."""
    jwks_url: HttpUrl | None = None
    """URL of the JWKS with the token issuer's public keys (RS256, ES256, EdDSA)."""
    jwt_issuer: Claim | None = None
    """Required value of a token's `iss` claim. Unset: not checked."""
    jwt_audience: Claim | None = None
    """Required value of a token's `aud` claim. Set it when you set jwks_url. Otherwise tokens that
    the issuer made for other services are accepted too."""
    revoke_for_s: Seconds = 30 * 24 * 3600
    """Seconds for which a revocation of tokens lasts (DELETE /v1/sessions/{recipient}?revoke=true).
    Set it to the lifetime of your longest-lived tokens, or longer. The default is 30 days."""
    jwt_leeway_s: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 60
    """Seconds by which a token's `nbf` may be in the future, because the issuer's clock may be
    ahead. `exp` has no leeway."""
    allowed_origins: Annotated[tuple[Origin, ...], BeforeValidator(split_list)] = Field(
        default_factory=lambda given: ("*",) if given.get("dev") else ()
    )
    """Origins whose web pages may connect, separated by commas, like https://app.example.com or
    https://*.example.com for all its subdomains. * allows every origin. The instance's own origin
    is always allowed. Unset: no other is."""

    # --- Limits ---

    max_sessions: Annotated[int | None, Field(ge=1, le=MAX_VERSION)] = None
    """Most open sessions of this process, calls that wait included. By default what its file
    descriptor limit allows."""
    max_sessions_per_recipient: Annotated[int, Field(ge=1, le=MAX_VERSION)] = 64
    """Most open sessions of one recipient on this instance. One more closes the oldest. For a
    group there is no such limit."""
    max_listened_recipients: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Most further recipients that a session may listen to. 0: none."""
    max_sessions_per_address: Limit = unless_dev(1000)
    """Most open sessions from one client address, or from one /64 network of IPv6. 0: no limit. Set
    trusted_proxies if clients come through a proxy."""
    max_connections_per_address: Limit = unless_dev(1000)
    """Most HTTP connections from one client address, or /64 of IPv6, sessions not counted. At the
    limit the one that has waited longest for a request is closed. 0: no limit."""
    handshakes_per_s: Limit = unless_dev(500)
    """Most WebSocket handshakes with a valid token accepted per second. A client above the limit
    gets a Retry-After that covers the queue ahead of it. 0: no limit."""
    trusted_proxies: Annotated[tuple[Network, ...], BeforeValidator(split_list)] = ()
    """Networks (CIDR) of proxies whose X-Forwarded-... and Forwarded headers are believed,
    separated by commas."""

    # --- Timing ---

    ping_interval_s: Seconds = _SESSION_TIMING.ping_interval_s
    """Seconds between two pings of a session."""
    pong_timeout_s: Seconds = _SESSION_TIMING.pong_timeout_s
    """Seconds without a pong after which a session is closed."""
    max_session_s: Limit = Field(default=None, ge=0, le=CENTURY_S)
    """Longest life of a session in seconds. Then it is closed and its client reconnects. Each
    session's life is shortened at random by up to a fifth, so that they do not end at once. Set it
    below the limit of your platform, for example 3300 on Cloud Run. 0: no limit."""
    verify_every_s: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 60
    """Seconds in which every session is compared once with its recipient's mailbox. A client whose
    poke was lost anywhere on its way pulls within this time."""
    drain_s: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 5
    """Seconds over which a stopping instance spreads the closing of its sessions."""
    grace_s: Seconds = 10
    """Seconds that a stopping instance gives to running requests."""

    # --- Observability ---

    tracing: bool = False
    """Export OpenTelemetry traces of send, poke and deliver. The OTEL_... environment variables
    configure the exporter. Needs the extra otel."""
    log_format: Literal["json", "console"] = Field(
        default_factory=lambda given: "console" if given.get("dev") else "json"
    )
    """json: one JSON object a line. console: for people. The default is console with dev."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged: debug, info, warning or error."""

    @property
    def worker_count(self) -> int:
        """How many worker processes there are; 1: this process does everything."""
        return usable_cores() if self.workers == "auto" else self.workers

    @property
    def is_on_loopback(self) -> bool:
        """Whether only this machine reaches ``host``."""
        return is_loopback(self.host)

    @property
    def initial_mode(self) -> Mode:
        """The mode of a cluster that has no shard map yet."""
        return "fanout" if self.mode == "auto" else self.mode

    @property
    def push_webhook_key(self) -> bytes:
        """The key in ``push_webhook_secret``."""
        assert self.push_webhook_secret is not None, "it was checked"  # noqa: S101
        secret = self.push_webhook_secret.get_secret_value()
        return base64.b64decode(secret.removeprefix(WEBHOOK_SECRET))

    @model_validator(mode="after")
    def _check_push(self) -> Self:
        if self.no_mailbox and (self.ingress or self.push_webhook_url):
            name = "ingress" if self.ingress else "push_webhook_url"
            raise ValueError(f"{name} needs a mailbox: unset it, or unset no_mailbox")
        if self.push_webhook_url is None:
            return self
        url = urlsplit(self.push_webhook_url)
        if url.scheme != "https" and not (self.dev and is_loopback(url.hostname or "")):
            raise ValueError(
                "push_webhook_url must be an https:// URL (with --dev also http://localhost)"
            )
        if self.push_webhook_secret is None and "processor" in self.roles:
            raise ValueError(
                f"push_webhook_secret ({ENV_PREFIX}PUSH_WEBHOOK_SECRET) must be set:"
                " it signs the requests to push_webhook_url"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        if self.workers == 1:
            return self
        if not self.roles & {"gateway", "api"}:
            raise ValueError("workers must be 1 without the roles gateway and api: nobody connects")
        if self.tracing:
            raise ValueError("workers must be 1 with tracing: traces do not cross processes")
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        has_callers = bool(self.roles & {"gateway", "api"})
        if has_callers and self.jwt_secret is None and self.jwks_url is None:
            raise ValueError(
                f"jwt_secret ({ENV_PREFIX}JWT_SECRET, at least 32 bytes) or jwks_url must be set;"
                " for development, --dev makes a random secret"
            )
        return self


class _Given(NamedTuple):
    value: Any
    origin: str


def groups() -> dict[str, list[str]]:
    """The names of the settings, by the title of their group, in the order of this file.

    The titles are the comments among the fields.
    """
    found: dict[str, list[str]] = {}
    for title, name in _TITLE_OR_FIELD.findall(inspect.getsource(Settings)):
        if title:
            found[title] = []
        elif name in Settings.model_fields:
            found[list(found)[-1]].append(name)
    return found


def load_settings(
    config_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings from ``overrides`` (flags), ``environ`` and the TOML ``config_file``.

    An override beats a variable, and a variable beats the file. An override of ``None`` and an
    empty variable count as not given. Without a ``config_file`` the file that
    ``POKEBRIDGE_CONFIG`` names is read. ``environ`` is the process's environment by default.

    Raises:
        ConfigError: a setting is wrong. The message is one line with its name, its source and the
            values that it may have. It omits the value, which may be a secret.
    """
    try:
        return _load(config_file, overrides or {}, os.environ if environ is None else environ)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - the guard of this border
        raise ConfigError(f"settings: {describe_unforeseen('settings', error)}") from None


def _load(
    config_file: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]
) -> Settings:
    if config_file is None and environ.get(f"{ENV_PREFIX}CONFIG"):
        config_file = Path(environ[f"{ENV_PREFIX}CONFIG"])
    given = {} if config_file is None else _from_file(config_file)
    given |= _from_environment(environ)
    for name, value in overrides.items():
        if value is not None:
            given[name] = _Given(value, f"--{name.replace('_', '-')}")
    for name, (value, origin) in given.items():
        if name not in Settings.model_fields:
            shown = origin if origin.isprintable() else ascii(origin)
            raise ConfigError(f"{shown}: unknown setting{_did_you_mean(name)}")
        if isinstance(value, bool) and Settings.model_fields[name].annotation is not bool:
            raise ConfigError(f"{origin}: must not be true or false")
    try:
        return Settings.model_validate({name: item.value for name, item in given.items()})
    except ValidationError as error:
        raise ConfigError(_one_line(error, given)) from None


def _from_file(path: Path) -> dict[str, _Given]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config {path}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"config {path}: nested too deeply: no setting is nested") from None
    return {name: _Given(value, f"{name} in {path}") for name, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    given = {}
    for variable, value in environ.items():
        suffix = variable.removeprefix(ENV_PREFIX)
        name = suffix.lower()
        is_ours = suffix != variable and name not in _OTHER_VARIABLES
        if is_ours and value and not _is_service_link(suffix, value):
            given[name] = _Given(value, variable)
    return given


def _is_service_link(suffix: str, value: str) -> bool:
    if _SERVICE_LINK.fullmatch(suffix):
        return True
    return suffix.endswith("PORT") and _SERVICE_LINK_VALUE.fullmatch(value) is not None


def _did_you_mean(name: str) -> str:
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: ValidationError, given: Mapping[str, _Given]) -> str:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    where = errors[0]["loc"][:1]
    # One value may fail in several ways, where a setting may be a number or a word.
    said = dict.fromkeys(each["msg"] for each in errors if each["loc"][:1] == where)
    meaning = ", or ".join(said).replace("Value error, ", "").replace("Input should be", "must be")
    if not where:
        return meaning
    name = str(where[0])
    return f"{given[name].origin if name in given else name}: {meaning}"
