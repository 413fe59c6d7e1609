"""The disconnects of the last minutes, and the revocations that are in force.

A signal may be lost in a gap, and so may a disconnect. So each instance keeps the recent
disconnects, and repeats them for an instance that reports missed signals.
"""

from collections.abc import Sequence

from pokebridge.wire import Disconnect

KEPT_S = 600.0
MAX_RECENT = 10_000
# How far the clocks of two instances may differ. A session that began so long after the disconnect,
# or longer, is left alone when the disconnect is repeated.
SLACK_S = 5.0
# How many revocations are added before the expired ones are removed.
_SWEEP_AFTER = 1000


class Disconnects:
    """What was disconnected and revoked lately. Callers pass ``now_s``, in Unix seconds."""

    def __init__(self) -> None:
        # By recipient and whether it revokes: when it was heard last, and what. In that order.
        self._recent: dict[tuple[str, bool], tuple[float, Disconnect]] = {}
        # The newest revocation of each recipient.
        self._revoked: dict[str, Disconnect] = {}
        self._added = 0

    def note(self, disconnect: Disconnect, now_s: float) -> bool:
        """Keep ``disconnect``, which has an ``at_ms``. Returns whether it was not known yet."""
        key, at_ms = (disconnect.recipient, disconnect.until_ms is not None), disconnect.at_ms or 0
        _, known = self._recent.get(key, (0.0, None))
        known_ms = 0 if known is None else known.at_ms or 0
        if known is not None and at_ms < known_ms:
            return False  # so nobody has repeated the newer one
        self._recent.pop(key, None)
        if now_s - at_ms / 1000 < KEPT_S:
            self._recent[key] = (now_s, disconnect)
        if len(self._recent) > MAX_RECENT:
            del self._recent[next(iter(self._recent))]
        if disconnect.until_ms is not None:
            self._revoke(disconnect, now_s)
        return known is None or known_ms < at_ms

    def to_repeat(self, now_s: float, *, unless_heard_since_s: float) -> Sequence[Disconnect]:
        """The recent disconnects that nobody has repeated since ``unless_heard_since_s``."""
        return [
            disconnect._replace(is_repeated=True)
            for heard_s, disconnect in self._recent.values()
            if heard_s < unless_heard_since_s and now_s - (disconnect.at_ms or 0) / 1000 < KEPT_S
        ]

    def in_force(self, now_s: float) -> Sequence[Disconnect]:
        """The revocations that have not run out."""
        return [each for each in self._revoked.values() if now_s * 1000 < (each.until_ms or 0)]

    def refuses(self, recipient: str, issued_at: float | None, now_s: float) -> bool:
        """Whether a token of ``recipient`` that was issued at ``issued_at`` is revoked.

        ``None`` stands for a token that does not say when; it counts as old.
        """
        revoked = self._revoked.get(recipient)
        if revoked is None or now_s * 1000 >= (revoked.until_ms or 0):
            return False
        return issued_at is None or not issued_at * 1000 >= (revoked.at_ms or 0)

    def _revoke(self, disconnect: Disconnect, now_s: float) -> None:
        known = self._revoked.get(disconnect.recipient)
        if known is None or (known.at_ms or 0) <= (disconnect.at_ms or 0):
            self._revoked[disconnect.recipient] = disconnect
        self._added += 1
        if self._added > _SWEEP_AFTER:
            self._added = 0
            self._revoked = {
                recipient: each
                for recipient, each in self._revoked.items()
                if now_s * 1000 < (each.until_ms or 0)
            }
