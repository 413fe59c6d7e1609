"""CPU of a delivered poke: ``handle_poke``, a C loop of ``send()``, and the websockets library.

Each is a process with its own clients over loopback TCP. In every round each sends the same number
of pokes, so a machine that is slow for a while is slow for all three. A round counts only if its
clients have received every poke: none lost, none merged.
"""

import contextlib
from collections.abc import AsyncIterator

from benchmarks.harness import (
    Child,
    Figure,
    child,
    compare,
    herd,
    load_program,
    peer,
    progress,
    tokens,
)

AT_MOST_FLOOR = 1.4
AT_MOST_WEBSOCKETS = 0.7
UNMEASURED = 20

KINDS = ("floor", "pokebridge", "websockets")


async def measure(*, clients: int = 1000, parts: int = 5, rounds: int = 10) -> list[Figure]:
    """In every round send ``UNMEASURED`` pokes to each client, then ``parts`` times as many."""
    at_once = clients * UNMEASURED
    cpu_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
    async with contextlib.AsyncExitStack() as stack:
        senders = {kind: await stack.enter_async_context(_sender(kind, clients)) for kind in KINDS}
        herds = {
            kind: await stack.enter_async_context(
                herd(port, tokens(clients), pokes_at_once=at_once)
            )
            for kind, (port, _) in senders.items()
        }

        async def send_cpu_s(kind: str, parts: int) -> float:
            _, sender = senders[kind]
            sender.tell(f"{parts * UNMEASURED}\n")
            used_s = float(await sender.line())
            for _ in range(parts):
                await herds[kind].hear(at_once)
            return used_s

        for number in range(rounds + 1):  # the first warms up
            for kind in KINDS:
                await send_cpu_s(kind, 1)
                used_s = await send_cpu_s(kind, parts)
                if number:
                    cpu_us[kind].append(used_s / (parts * at_once) * 1e6)
            progress(f"pokes: round {number} of {rounds}")
    pokes = rounds * parts * at_once
    return [
        compare(
            "pokes",
            f"CPU of {pokes:,} pokes, to {yardstick}",
            cpu_us["pokebridge"],
            cpu_us[kind],
            "us a poke",
            at_most,
        )
        for kind, yardstick, at_most in (
            ("floor", "C send()", AT_MOST_FLOOR),
            ("websockets", "websockets", AT_MOST_WEBSOCKETS),
        )
    ]


@contextlib.asynccontextmanager
async def _sender(kind: str, clients: int) -> AsyncIterator[tuple[int, Child]]:
    """The port of a server, and the process that takes the number of sweeps to send."""
    if kind == "floor":
        async with child("load send", load_program(), "send", str(clients)) as it:
            yield int(await it.line()), it
    else:
        async with peer(kind) as (server, it):
            yield server.port, it
