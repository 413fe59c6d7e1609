"""What an instance says about itself: the names of its metrics, and its log.

Connections, faults and changes of state are logged, single pokes and messages are counted. A log
line holds no token, no secret and no query string: values under telling names are left out whole,
and whatever looks like a token is cut out of every text.
"""

import logging
import logging.config
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


class Metric(StrEnum):
    """Every Prometheus metric and its ``meaning``; its labels, if any, stand in parentheses.

    ``…_total`` counts, ``…_seconds`` is a histogram, the others are gauges.
    """

    meaning: str

    BUILD_INFO = "pokebridge_build_info", "Always 1 (version, instance)"
    SESSIONS = "pokebridge_sessions", "Open sessions"
    SESSIONS_MOVED = "pokebridge_sessions_moved_total", "Sessions sent after their shard"
    HANDSHAKES = "pokebridge_handshakes_total", "WebSocket handshakes answered (status)"
    SIGNALS = "pokebridge_signals_total", "Signals that the transport delivered, probes included"
    SIGNALS_UNTAGGED = "pokebridge_signals_untagged_total", "Signals without a valid shard tag"
    SIGNALS_MALFORMED = "pokebridge_signals_malformed_total", "Signals dropped: not of the contract"
    POKES = "pokebridge_pokes_total", "Pokes that the signals carried"
    POKES_NOISE = "pokebridge_pokes_noise_total", "Pokes for recipients without a session here"
    POKES_DELIVERED = "pokebridge_pokes_delivered_total", "Poke frames handed to a socket"
    POKES_MERGED = "pokebridge_pokes_merged_total", "Pokes merged into a session's pending one"
    POKES_PUBLISHED = "pokebridge_pokes_published_total", "Pokes that the transport accepted"
    POKES_LOST = "pokebridge_pokes_lost_total", "Lost pokes that verification made up for"
    GAPS = "pokebridge_gaps_total", "Gaps of the transport, after which its sessions were poked"
    PROBES = "pokebridge_probes_total", "Probes sent through the transport"
    BEACONS_LOST = "pokebridge_beacons_lost_total", "Other instances' beacons that did not arrive"
    PEERS = "pokebridge_peers", "Other instances whose beacons are heard"
    PEERS_SILENT = "pokebridge_peers_silent", "Members of the cluster that are not heard any more"
    DISAGREEMENTS = (
        "pokebridge_disagreements",
        "Instances heard that differ in what must agree (setting)",
    )
    SUBSCRIPTIONS = "pokebridge_subscriptions", "Subscriptions held, proven live or not"
    SHARDS_OWNED = "pokebridge_shards_owned", "Shards that the shard map gives to this instance"
    CLUSTER_EPOCH = "pokebridge_cluster_epoch", "Epoch of the shard map in force here"
    CLUSTER_MEMBERS = "pokebridge_cluster_members", "Members that hold a lease"
    CLUSTER_LEADER = "pokebridge_cluster_leader", "1 when this instance plans the shard map"
    CLUSTER_PARTITIONED = "pokebridge_cluster_partitioned", "1 when partitioned, 0 in fan-out"
    COORDINATION_UP = "pokebridge_coordination_up", "1 while the coordination store answers"
    NOISE_RATIO = "pokebridge_noise_ratio", "CPU time spent on others' pokes, 0 to 1"
    GLOBAL_OPS = "pokebridge_global_ops_per_s", "Signals delivered a second in the whole cluster"
    RED_LINE = "pokebridge_red_line_ops_per_s", "The red line, as set"
    OVER_RED_LINE = "pokebridge_over_red_line", "1 while the cluster is over the red line"
    PULL_CAPACITY = "pokebridge_pull_capacity_per_s", "Pulls a second to which they are spread"
    MESSAGES_COMMITTED = "pokebridge_messages_committed_total", "Messages committed to a mailbox"
    MESSAGES_REFUSED = "pokebridge_messages_refused_total", "Messages refused: a mailbox was full"
    PUSHES = "pokebridge_pushes_total", "Notifications posted to the webhook (result)"
    INGRESS_MESSAGES = "pokebridge_ingress_messages_total", "Messages from the queue (result)"
    TASK_FAILURES = "pokebridge_task_failures_total", "Unforeseen errors in the background (task)"
    INGRESS_UP = "pokebridge_ingress_up", "1 while the queue can be read"
    HTTP_SECONDS = (
        "pokebridge_http_request_duration_seconds",
        "Time to answer an HTTP request (method, route, status)",
    )

    def __new__(cls, name: str, meaning: str) -> Self:
        """A metric is its name, with a meaning."""
        metric = str.__new__(cls, name)
        metric._value_ = name
        metric.meaning = meaning
        return metric


_HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"(^|_)(token|secret|authorization|password)$", re.IGNORECASE)
# A query string of a URL or of a request's target, credentials after their scheme, any JWT.
_SECRET_TEXT = re.compile(
    r"(?<=\?)[\w.~%-]+=[^\s\"'<>]*"
    r"|(?<=bearer[ .])[^\s\"',;]+"
    r"|\beyJ[\w-]+\.[\w-]*(\.[\w-]*)?"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)",
    re.IGNORECASE,
)


def configure_logging(log_format: str, level: str) -> None:
    """Send structlog's and the standard library's log lines to stderr in one form.

    ``log_format`` is ``json`` (one object a line) or ``console``; ``level`` as in ``logging``, in
    any case. May be called again. There is no access log: it would repeat the metrics, at a cost
    for each request.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=False)]
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


def hide_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor that takes secrets out of an event, nested values included."""
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
