"""Everything in Python that differs from run to run, replaced so that it depends on the seed.

The simulated code is the real code. It asks Python for random numbers, for the time, and for the
order of sets. During a simulation the answers come from here.
"""

import asyncio
import functools
import random
import secrets
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import structlog

from pokebridge.cluster import load as cluster_load
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.polling import PolledSession
from pokebridge.model import Feed
from pokebridge.server import token_keys
from pokebridge.workers.link import RemoteSession
from simulation.loop import VirtualLoop
from simulation.tokens import SimVerifier

OnLog = Callable[[str, str], None]
"""Takes a log line: the name of its process, and its text."""


_FEED_HASHES = {feed.value: -2 - place for place, feed in enumerate(Feed)}


@contextmanager
def under_control(seed: int, on_log: OnLog = lambda _where, _what: None) -> Iterator[None]:
    """Everything inside depends on ``seed`` alone, the hash seed and the real clock included."""
    state = random.getstate()
    random.seed(seed)
    with ExitStack() as undo:
        for target, name, replacement in _replacements():
            undo.enter_context(patch.object(target, name, replacement))
        undo.enter_context(_logging_to(on_log))
        try:
            yield
        finally:
            random.setstate(state)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    yield secrets, "token_hex", _token_hex
    yield uuid, "uuid4", lambda: uuid.UUID(int=random.getrandbits(128))
    yield from _clocks()
    # An object's hash is its address, a string's hash has a seed of its own: the order of sets
    # would follow them.
    yield Connection, "__hash__", lambda each: hash(int(each.session.id, 16))
    yield PolledSession, "__hash__", lambda each: hash(int(each.session.id, 16))
    yield RemoteSession, "__hash__", lambda each: hash((each.link.number, each.number))
    yield Feed, "__hash__", lambda each: _FEED_HASHES[each.value]
    yield cluster_load, "memory_bytes", lambda: 0
    yield token_keys, "TokenVerifier", lambda **_: SimVerifier()


@functools.cache
def _clocks() -> list[tuple[Any, str, Any]]:
    """Every place where our code has one of Python's clocks: in a module, or as a default."""
    virtual: dict[Any, Callable[[], float]] = {
        time.time: _virtual(time.time, VirtualLoop.wall),
        time.monotonic: _virtual(time.monotonic, VirtualLoop.time),
        time.perf_counter: _virtual(time.perf_counter, VirtualLoop.time),
        time.process_time: _virtual(time.process_time, lambda _: 0.0),
        time.thread_time: _virtual(time.thread_time, lambda _: 0.0),
    }
    found: list[tuple[Any, str, Any]] = [(time, real.__name__, virtual[real]) for real in virtual]
    for name, module in tuple(sys.modules.items()):
        if not name.startswith("pokebridge.") or name == __name__:
            continue
        for attribute, value in tuple(vars(module).items()):
            if isinstance(value, types.BuiltinFunctionType) and value in virtual:
                found.append((module, attribute, virtual[value]))
            defaults = getattr(getattr(value, "__init__", None), "__defaults__", None) or ()
            if getattr(value, "__module__", "") == name and any(map(_is_in(virtual), defaults)):
                new = tuple(virtual[each] if _is_in(virtual)(each) else each for each in defaults)
                found.append((value.__init__, "__defaults__", new))
    return found


def _is_in(clocks: Mapping[Any, object]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, types.BuiltinFunctionType) and value in clocks


def _token_hex(size_bytes: int = 8) -> str:
    return f"{random.getrandbits(8 * size_bytes):0{2 * size_bytes}x}"


def _virtual(
    real: Callable[[], float], virtual: Callable[[VirtualLoop], float]
) -> Callable[[], float]:
    """A clock that is a simulated process's for its code, and the real one for all others."""

    def clock() -> float:
        loop = asyncio._get_running_loop()  # noqa: SLF001 - documented for event loops
        return virtual(loop) if isinstance(loop, VirtualLoop) else real()

    return clock


@contextmanager
def _logging_to(on_log: OnLog) -> Iterator[None]:
    """Pass the log lines of the code to ``on_log``, and restore the configuration afterwards."""

    def tell(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Any:
        loop = asyncio._get_running_loop()  # noqa: SLF001 - the same
        if isinstance(loop, VirtualLoop):
            what = event.pop("event")
            details = " ".join(f"{name}={value}" for name, value in event.items())
            on_log(loop.name, f"log: {what} {details}")
        raise structlog.DropEvent

    was_configured, before = structlog.is_configured(), structlog.get_config()
    structlog.configure(
        processors=[tell],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=lambda *_: None,
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.reset_defaults()
        if was_configured:
            structlog.configure(**before)
