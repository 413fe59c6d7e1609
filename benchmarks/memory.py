"""Memory of an idle session: the growth of a real instance's RSS when clients connect.

The kernel's memory of the sockets is about the same for every server, and not in the RSS.
"""

from contextlib import AbstractAsyncContextManager

from benchmarks.harness import (
    Figure,
    Server,
    connect_and_leave,
    herd,
    instance,
    progress,
    tokens,
    websockets_server,
)

AT_MOST_KB = 2.1


async def measure(*, clients: int = 10_000, warm_up: int = 300) -> list[Figure]:
    """Connect ``clients``, after ``warm_up`` others have come and gone."""
    ours_kb = await _growth_kb(instance(), clients, warm_up)
    progress("memory: pokebridge is measured")
    theirs_kb = await _growth_kb(websockets_server(), clients, warm_up)
    name = f"RSS of an idle session, at {clients:,}"
    return [
        Figure("memory", name, ours_kb, "KB", AT_MOST_KB, "1 KB is 1,024 bytes"),
        Figure(
            "memory",
            f"{name}, to websockets",
            ours_kb / theirs_kb,
            "x",
            detail=f"{ours_kb:.2f} to {theirs_kb:.2f} KB",
        ),
    ]


async def _growth_kb(
    starting: AbstractAsyncContextManager[Server], clients: int, warm_up: int
) -> float:
    async with starting as server:
        await connect_and_leave(server, tokens(warm_up))
        before = server.rss_bytes()
        async with herd(server.port, tokens(clients)):
            return (server.rss_bytes() - before) / clients / 1024
