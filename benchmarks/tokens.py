"""CPU of verifying a token: remembered, new, and with PyJWT alone.

Ten thousand clients each present a token of their own, in turn. With the default size all of them
are remembered from the second turn on. With half the room none ever is: by its next turn a token
has always been pushed out.
"""

import time
from collections.abc import Callable, Sequence

import jwt

from benchmarks.harness import SECRET, Figure, compare, progress, tokens
from pokebridge.tokens import TokenVerifier

AT_MOST_PYJWT = {"remembered": 0.1, "never remembered": 0.5}


async def measure(*, clients: int = 10_000, rounds: int = 7) -> list[Figure]:
    """In every round verify all tokens in turn, in each way."""
    bearers = tokens(clients)
    ways: dict[str, Callable[[str], object]] = {
        "remembered": TokenVerifier(secret=SECRET).verify_now,
        "never remembered": TokenVerifier(secret=SECRET, max_verified=clients // 2).verify_now,
        "PyJWT": lambda token: jwt.decode(token, SECRET, ["HS256"]),
    }
    cpu_us: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        for name, verify in ways.items():
            used_us = _cpu_us(verify, bearers)
            if number:
                cpu_us[name].append(used_us)
        progress(f"tokens: round {number} of {rounds}")
    return [
        compare(
            "tokens",
            f"{clients:,} tokens in turn, {name}, to PyJWT",
            cpu_us[name],
            cpu_us["PyJWT"],
            "us a token",
            at_most,
        )
        for name, at_most in AT_MOST_PYJWT.items()
    ]


def _cpu_us(verify: Callable[[str], object], bearers: Sequence[str]) -> float:
    started_s = time.process_time()
    for bearer in bearers:
        verify(bearer)
    return (time.process_time() - started_s) / len(bearers) * 1e6
