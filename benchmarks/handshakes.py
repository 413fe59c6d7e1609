"""CPU of an authenticated handshake, of a real instance and of the websockets library.

Both verify another token for each client, with the same verifier, and send ``ready``.
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

AT_MOST_WEBSOCKETS = 1.0


async def measure(*, clients: int = 2000, rounds: int = 5) -> list[Figure]:
    """In every round connect ``clients`` to one server after the other, and disconnect them."""
    cpu_ms: dict[str, list[float]] = {"pokebridge": [], "websockets": []}
    bearers = tokens(clients)
    async with instance() as ours, websockets_server() as theirs:
        for number in range(rounds + 1):  # the first warms up
            for name, server in (("pokebridge", ours), ("websockets", theirs)):
                used_s = await connect_and_leave(server, bearers)
                if number:
                    cpu_ms[name].append(used_s / clients * 1e6)
            progress(f"handshakes: round {number} of {rounds}")
    return [
        compare(
            "handshakes",
            "CPU of 1,000 handshakes, to websockets",
            cpu_ms["pokebridge"],
            cpu_ms["websockets"],
            "ms",
            AT_MOST_WEBSOCKETS,
        )
    ]
