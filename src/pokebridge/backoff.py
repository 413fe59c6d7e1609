"""Random pauses: between attempts that fail, and between the rounds of periodic work.

Many instances do the same work. Without randomness an outage would synchronise them, and they would
all return at once.
"""

import random


def spread(seconds: float, least: float = 0.5, most: float = 1.5) -> float:
    """``seconds``, times a random factor from ``least`` to ``most``."""
    return seconds * random.uniform(least, most)  # noqa: S311 - it spreads load, and keeps no secret


def backoff_s(failures: int, *, first_s: float, cap_s: float, least: float = 0.0) -> float:
    """The pause before another attempt, after one that failed and ``failures`` before it.

    The longest pause doubles with each failure, from ``first_s`` to ``cap_s``. The pause is random
    between the share ``least`` of the longest one and all of it. The default, 0, is full jitter.
    """
    longest_s = min(cap_s, first_s * 2.0 ** min(failures, 60))  # a float ends before 2**1024
    return random.uniform(least * longest_s, longest_s)  # noqa: S311 - no secret: it spreads load
