"""How many sockets fit into this process: its limit of file descriptors, raised and shared out."""

import errno
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from pokebridge.errors import ConfigError
from pokebridge.gateway.sockets import Sockets

# Used if there is no limit. It is also Linux's default maximum (fs.nr_open).
_ENDLESS = 1_048_576
# For what the mailbox, the transport and the libraries open later.
_LEAST_RESERVE, _MOST_RESERVE = 24, 256
# A quarter of the sockets is for HTTP connections, which pulls need; at most this many on a host.
_MOST_CONNECTIONS = 1_000
_LEAST_SOCKETS = 16
# Its channel and its door, and their other ends while it is forked.
_EACH_WORKER = 4
_TO_RELIEVE = 32

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Room:
    """What fits.

    Attributes:
        descriptors: the limit of this process.
        sockets: the sessions and HTTP connections that there may be together.
        sessions: the sessions among them.
    """

    descriptors: int
    sockets: int
    sessions: int


def make_room(max_sessions: int | None = None, *, processes: int = 1) -> Room:
    """Raise the limit of descriptors to the hard one, and share them out.

    ``max_sessions`` is lowered to what fits, and without it as many sessions as fit are taken. This
    is one of so many ``processes`` that share the HTTP connections. Call it when everything else is
    open, because what is open counts.

    Raises:
        ConfigError: hardly any socket fits.
    """
    limit = raise_limit()
    reserve = min(_MOST_RESERVE, max(_LEAST_RESERVE, limit // 8))
    sockets = limit - _count_open() - reserve
    if sockets < _LEAST_SOCKETS:
        raise ConfigError(
            f"only {limit} files may be open, which is too few: raise the limit (ulimit -n,"
            " LimitNOFILE) to 512 or more"
        )
    fits = sockets - min(_MOST_CONNECTIONS // processes, sockets // 4)
    sessions = min(max_sessions or fits, fits)
    log.info("descriptors_shared", descriptors=limit, sockets=sockets, sessions=sessions)
    if max_sessions is not None and max_sessions > fits:
        log.warning("max_sessions_lowered", max_sessions=max_sessions, sessions=fits)
    return Room(limit, sockets, sessions)


def relieve(sockets: Sockets) -> None:
    """Close connections that wait if this process can open no other file now."""
    try:
        os.close(os.dup(2))
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            sockets.relieve(_TO_RELIEVE)


def make_room_for_workers(workers: int) -> None:
    """Raise the limit of descriptors to the hard one. Call it when everything else is open.

    Raises:
        ConfigError: this process can't be the hub of so many workers.
    """
    limit = raise_limit()
    needed = _count_open() + workers * _EACH_WORKER + _LEAST_RESERVE
    if needed > limit:
        raise ConfigError(
            f"the hub of {workers} workers needs {needed} open files, and only {limit} may be open:"
            " set fewer workers, or raise the limit (ulimit -n, LimitNOFILE)"
        )


def _count_open() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def raise_limit() -> int:
    """Raise the limit of descriptors to the hard one. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENDLESS if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    with suppress(OSError, ValueError):  # not allowed: the soft limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
