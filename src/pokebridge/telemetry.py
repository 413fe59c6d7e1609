"""The names of the metrics, and the log.

Connections, faults and changes of state are logged. Single pokes and messages are counted. A log
line holds no token, no secret and no query string: the values of fields named like a secret are
hidden, and text that looks like a token is removed from every other value.
"""

import logging
import logging.config
import re
from collections.abc import Hashable, Mapping
from enum import StrEnum
from typing import Any, Self

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# A stranger can make up kinds of errors.
_MOST_KINDS = 1_000


class Metric(StrEnum):
    """Every Prometheus metric with its ``meaning``. Its labels, if any, are in parentheses.

    ``…_total`` is a counter, ``…_seconds`` a histogram, and the others are gauges.
    """

    meaning: str

    BUILD_INFO = "pokebridge_build_info", "Always 1 (version, instance)"
    SESSIONS = "pokebridge_sessions", "Open sessions"
    LISTENED = "pokebridge_listened_recipients", "Recipients that sessions listen to beside theirs"
    SESSIONS_MOVED = "pokebridge_sessions_moved_total", "Sessions moved to the owner of their shard"
    HANDSHAKES = "pokebridge_handshakes_total", "WebSocket handshakes answered (status)"
    SIGNALS = "pokebridge_signals_total", "Signals that the transport delivered, with probes"
    SIGNALS_UNTAGGED = "pokebridge_signals_untagged_total", "Signals without a valid shard tag"
    SIGNALS_MALFORMED = (
        "pokebridge_signals_malformed_total",
        "Signals dropped because they were invalid",
    )
    POKES = "pokebridge_pokes_total", "Pokes that the signals carried"
    POKES_NOISE = "pokebridge_pokes_noise_total", "Pokes for recipients without a session here"
    POKES_DELIVERED = "pokebridge_pokes_delivered_total", "Poke frames handed to a socket"
    POKES_MERGED = "pokebridge_pokes_merged_total", "Pokes merged into a session's pending one"
    POKES_PUBLISHED = "pokebridge_pokes_published_total", "Pokes that the transport accepted"
    POKES_LOST = "pokebridge_pokes_lost_total", "Lost pokes that verification sent again"
    ACKS_HEARD = "pokebridge_acks_heard_total", "Acks that came over WebSockets"
    ACKS_RECORDED = (
        "pokebridge_acks_recorded_total",
        "Those that were recorded in the mailbox, after merging",
    )
    GAPS = "pokebridge_gaps_total", "Gaps of the transport; the affected sessions were poked"
    PROBES = "pokebridge_probes_total", "Probes sent through the transport"
    BEACONS_LOST = "pokebridge_beacons_lost_total", "Other instances' beacons that did not arrive"
    PEERS = "pokebridge_peers", "Other instances whose beacons are heard"
    PEERS_SILENT = "pokebridge_peers_silent", "Members of the cluster that are not heard"
    DISAGREEMENTS = (
        "pokebridge_disagreements",
        "Instances heard that differ in what must agree (setting)",
    )
    SUBSCRIPTIONS = "pokebridge_subscriptions", "Open subscriptions, proven live or not"
    SHARDS_OWNED = "pokebridge_shards_owned", "Shards that this instance owns"
    CLUSTER_EPOCH = "pokebridge_cluster_epoch", "Epoch of the shard map that this instance applies"
    CLUSTER_MEMBERS = "pokebridge_cluster_members", "Members that hold a lease"
    CLUSTER_LEADER = "pokebridge_cluster_leader", "1 when this instance plans the shard map"
    CLUSTER_PARTITIONED = "pokebridge_cluster_partitioned", "1 when partitioned, 0 in fan-out"
    COORDINATION_UP = "pokebridge_coordination_up", "1 while the coordination store answers"
    NOISE_RATIO = "pokebridge_noise_ratio", "Share of CPU time spent on other instances' pokes"
    GLOBAL_OPS = "pokebridge_global_ops_per_s", "Signals delivered per second in the whole cluster"
    RED_LINE = "pokebridge_red_line_ops_per_s", "The red line, as configured"
    OVER_RED_LINE = "pokebridge_over_red_line", "1 while the cluster is over the red line"
    PULL_CAPACITY = (
        "pokebridge_pull_capacity_per_s",
        "Pulls per second that poked clients are spread to",
    )
    MESSAGES_COMMITTED = "pokebridge_messages_committed_total", "Messages committed to a mailbox"
    MESSAGES_REFUSED = (
        "pokebridge_messages_refused_total",
        "Messages refused because a mailbox was full",
    )
    PUSHES = "pokebridge_pushes_total", "Notifications posted to the webhook (result)"
    INGRESS_MESSAGES = "pokebridge_ingress_messages_total", "Messages from the queue (result)"
    POKES_UNPUBLISHABLE = (
        "pokebridge_pokes_unpublishable_total",
        "Pokes that the transport refuses, set aside",
    )
    CONNECTIONS = "pokebridge_connections", "Open HTTP connections, sessions not counted"
    CONNECTIONS_LIMITED = (
        "pokebridge_connections_limited_total",
        "HTTP connections that were closed or refused because a limit was reached",
    )
    UNFORESEEN_INPUTS = (
        "pokebridge_unforeseen_inputs_total",
        "Inputs from outside that met an unforeseen error and were refused (border)",
    )
    TASK_FAILURES = "pokebridge_task_failures_total", "Unforeseen errors in the background (task)"
    INGRESS_UP = "pokebridge_ingress_up", "1 while the queue can be read"
    WORKER_SESSIONS = "pokebridge_worker_sessions", "Open sessions of each worker (worker)"
    WORKER_CPU = (
        "pokebridge_worker_cpu_seconds_total",
        "CPU time of each worker's present process (worker)",
    )
    WORKER_STARTS = "pokebridge_worker_starts_total", "Starts of each worker's process (worker)"
    HTTP_SECONDS = (
        "pokebridge_http_request_duration_seconds",
        "Time to answer an HTTP request (method, route, status)",
    )

    def __new__(cls, name: str, meaning: str) -> Self:
        """Make a metric from its name and its meaning."""
        metric = str.__new__(cls, name)
        metric._value_ = name
        metric.meaning = meaning
        return metric


_HIDDEN = "[hidden]"
_OF_LINES = frozenset({"event", "exception", "stack"})
_SECRET_NAME = re.compile(r"(^|_)(token|secret|authorization|password)$", re.IGNORECASE)
# The query string of a URL or request target, credentials after their scheme, any JWT.
_SECRET_TEXT = re.compile(
    r"(?<=\?)[\w.~%-]+=[^\s\"'<>]*"
    r"|(?<=bearer[ .])[^\s\"',;]+"
    r"|\beyJ[\w-]+\.[\w-]*(\.[\w-]*)?"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)",
    re.IGNORECASE,
)


class LogPace:
    """Lets a line of each kind into the log at most once in ``again_s`` seconds."""

    def __init__(self, again_s: float) -> None:
        self._again_s = again_s
        self._logged_s: dict[Hashable, float] = {}

    def allows(self, kind: Hashable, now_s: float) -> bool:
        """Whether a line of ``kind`` may be logged now. If so it counts as logged."""
        if now_s - self._logged_s.get(kind, -self._again_s) < self._again_s:
            return False
        if len(self._logged_s) >= _MOST_KINDS:
            self._logged_s.clear()
        self._logged_s[kind] = now_s
        return True

    def forget(self) -> None:
        """Allow a line of every kind again."""
        self._logged_s.clear()


def configure_logging(log_format: str, level: str) -> None:
    """Send the log lines of structlog and of the standard library to stderr in one format.

    ``log_format`` is ``json`` (one object a line) or ``console``. ``level`` is a level of
    ``logging``, in upper or lower case. May be called again. There is no access log, because it
    would repeat the metrics at a cost for each request.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor] = (
        [quote_controls, structlog.dev.ConsoleRenderer(colors=False)]
        if log_format == "console"
        else [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer()]
    )
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": shared,
        "processors": [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            hide_secrets,
            *render,
        ],
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"pokebridge": formatter},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "pokebridge"}},
            "root": {"handlers": ["stderr"], "level": level.upper()},
            "loggers": {
                "uvicorn": {"handlers": [], "level": "NOTSET", "propagate": True},
                "uvicorn.error": {"handlers": [], "level": "WARNING", "propagate": True},
                "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
                # They log every request and its URL.
                "httpx": {"level": "WARNING"},
                "httpcore": {"level": "WARNING"},
            },
        }
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def quote_controls(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Quote the values that have control characters, as Python would. A structlog processor.

    Otherwise one could look like another line. Messages and tracebacks may have several lines.
    """
    return {
        name: repr(value)
        if isinstance(value, str) and not value.isprintable() and name not in _OF_LINES
        else value
        for name, value in event.items()
    }


def hide_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide the secrets of an event, also in nested values. This is a structlog processor."""
    return {name: _hidden(name, value) for name, value in event.items()}


def _hidden(name: str, value: Any) -> Any:
    if _SECRET_NAME.search(name):
        return _HIDDEN
    if isinstance(value, str):
        return _SECRET_TEXT.sub(_HIDDEN, value)
    if isinstance(value, Mapping):
        return {str(key): _hidden(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(name, item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _SECRET_TEXT.sub(_HIDDEN, repr(value))
