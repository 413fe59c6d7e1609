"""Dialling a server that has several hosts, or a name with several addresses.

One of them may be mute: it neither accepts nor refuses connections, or accepts but never answers.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from ipaddress import ip_address
from itertools import chain, zip_longest
from typing import Any, TypeVar

C = TypeVar("C")

# How long a host may take before the next is dialled as well: less when there are many, so that
# all of them are dialled within ALL_WITHIN_S.
STAGGER_S = 0.5
ALL_WITHIN_S = 2.0


async def first_of(
    dials: Sequence[Callable[[], Coroutine[Any, Any, C]]],
    discard: Callable[[C], Awaitable[None]],
    *,
    stagger_s: float | None = None,
) -> C:
    """Return the first connection that one of ``dials`` makes.

    Each dial begins ``stagger_s`` after the one before it, or as soon as one has failed. So a host
    that accepts connections and never answers costs half a second, and not the whole time.

    Args:
        dials: in order of preference; at least one. A dial that is cancelled must clean up.
        discard: closes a connection that came too late.
        stagger_s: by default :data:`STAGGER_S`, less when there are many.

    Raises:
        Exception: what the first dial that failed raised, when all have failed.
    """
    if stagger_s is None:
        stagger_s = min(STAGGER_S, ALL_WITHIN_S / len(dials))
    waiting = list(dials)
    dialling: set[asyncio.Task[C]] = set()
    failures: list[BaseException] = []
    try:
        while waiting or dialling:
            if waiting:
                dialling.add(asyncio.create_task(waiting.pop(0)()))
            done, dialling = await asyncio.wait(
                dialling,
                timeout=stagger_s if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            made = [task for task in done if task.exception() is None]
            failures += [error for task in done if (error := task.exception())]
            if made:
                dialling |= set(made[1:])
                return made[0].result()
        raise failures[0]
    finally:
        for task in dialling:
            task.cancel()
        for late in await asyncio.gather(*dialling, return_exceptions=True):
            if not isinstance(late, BaseException):
                await discard(late)


async def addresses_of(host: str, port: int) -> list[str]:
    """Return the IP addresses of ``host`` in the resolver's order, its families by turns.

    Families alternate, as RFC 8305 has it, because one of them may not be routed at all.

    Raises:
        OSError: the name has no address.
    """
    try:
        return [str(ip_address(host))]
    except ValueError:
        pass
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append(str(address[0]))
    turns = chain.from_iterable(zip_longest(*by_family.values()))
    return list(dict.fromkeys(address for address in turns if address is not None))
