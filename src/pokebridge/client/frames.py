"""What a client reads in the frames of a server, which it does not trust. Pure, as the core is."""

from typing import Any

import msgspec

# The longest that a server may make a client wait: a wrong header or frame can't silence it for
# long.
MAX_ASKED_DELAY_S = 300.0


def parse_frame(text: str) -> dict[str, Any]:
    """The message in ``text``; an empty one when it is no JSON object."""
    try:
        frame = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return {}
    return frame if isinstance(frame, dict) else {}


def number(value: object) -> float:
    """What a server sent as a number; 0 when it is none, or negative, or absurd."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    return 0.0


def asked_s(value: object, *, unit_s: float = 1.0) -> float:
    """A delay in seconds that the server asked for, within reason."""
    return min(number(value) * unit_s, MAX_ASKED_DELAY_S)


def version_of(value: object) -> int | None:
    """What a server sent as a version; ``None`` when it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
