"""CPU of an authenticated handshake, of a real instance and of the websockets library.

Both send ``ready``. The reference verifies every token with PyJWT. pokebridge caches tokens: in
every round each client connects with a new token, as after a restart, and reconnects with it, as
after an outage of its network.
"""

from benchmarks.harness import (
    Figure,
    compare,
    connect_and_leave,
    instance,
    progress,
    tokens,
    websockets_server,
)

AT_MOST_WEBSOCKETS = {"new": 0.6, "known": 0.5}


async def measure(*, clients: int = 2000, rounds: int = 5) -> list[Figure]:
    """In every round connect ``clients`` to each server in turn, twice, and disconnect them."""
    cpu_ms: dict[tuple[str, str], list[float]] = {}
    async with instance() as ours, websockets_server() as theirs:
        for number in range(rounds + 1):  # the first warms up
            bearers = tokens(clients, first=number * clients)
            for time in AT_MOST_WEBSOCKETS:
                for name, server in (("pokebridge", ours), ("websockets", theirs)):
                    used_s = await connect_and_leave(server, bearers)
                    if number:
                        cpu_ms.setdefault((name, time), []).append(used_s / clients * 1e6)
            progress(f"handshakes: round {number} of {rounds}")
    return [
        compare(
            "handshakes",
            f"CPU of 1,000 handshakes, tokens {time}, to websockets",
            cpu_ms["pokebridge", time],
            cpu_ms["websockets", time],
            "ms",
            at_most,
        )
        for time, at_most in AT_MOST_WEBSOCKETS.items()
    ]
