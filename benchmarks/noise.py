"""CPU of a poke without a recipient here: what fan-out costs each instance for each poke.

``Bridge.on_signal`` parses it, looks its recipient up among ten thousand others, and drops it. The
reference is parsing the same bytes with Python's own ``json``, in the same rounds.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence

from benchmarks.harness import SECRET, BenchmarkError, Figure, compare, progress, recipient
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.gateway import Gateway
from pokebridge.model import Poke
from pokebridge.session import Session, Timing
from pokebridge.tokens import TokenVerifier
from pokebridge.transport.memory import MemoryTransport
from pokebridge.wire import encode_pokes

BATCH = 100


async def measure(
    *, sessions: int = 10_000, strangers: int = 20_000, rounds: int = 15
) -> list[Figure]:
    """Drop a poke for each of ``strangers`` in every round, as single signals and in batches."""
    bridge = _gateway(sessions).bridge
    pokes = [Poke(recipient(sessions + number), 1_000_000 + number) for number in range(strangers)]
    single = [encode_pokes([poke]) for poke in pokes]
    batches = [encode_pokes(pokes[start : start + BATCH]) for start in range(0, strangers, BATCH)]
    figures = []
    for name, bodies in (("alone", single), (f"in a batch of {BATCH}", batches)):
        progress(f"noise: {name}")
        ours_ns, json_ns = [], []
        for _ in range(rounds):
            ours_ns.append(_cpu_ns(bridge.on_signal, bodies) / strangers)
            json_ns.append(_cpu_ns(json.loads, bodies) / strangers)
        title = f"CPU of a stranger's poke, {name}, to json.loads"
        figures.append(compare("noise", title, ours_ns, json_ns, "ns a poke"))
    if bridge.counters.noise != 2 * rounds * strangers:
        raise BenchmarkError("the bridge did not count every poke as noise")
    return figures


def _cpu_ns(call: Callable[[bytes], object], bodies: Sequence[bytes]) -> int:
    started_ns = time.process_time_ns()
    for body in bodies:
        call(body)
    return time.process_time_ns() - started_ns


def _gateway(sessions: int) -> Gateway:
    """A gateway with real sessions that receive no pokes."""
    config = GatewayConfig(instance="bench", max_sessions_per_recipient=64, verify_every_s=60)
    gateway = Gateway(config, MemoryTransport(), TokenVerifier(secret=SECRET))
    for number in range(sessions):
        session = Session(
            recipient(number), "default", f"{number:016}", expires_at=1.0, now=0.0, timing=Timing()
        )
        gateway.sessions.add(Connection(gateway, asyncio.Transport(), session, "127.0.0.1"))
    return gateway
