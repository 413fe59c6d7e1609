"""Compare what sessions were poked for with what is in the mailbox, and poke those that are behind.

Probes, gaps and the outbox depend on what an engine reports. Verification does not: it asks the
mailbox for the newest version of each connected recipient in turn. So a poke that was lost anywhere
between the publisher and the socket is sent again within ``verify_every_s``, whatever the transport
does.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import structlog

from pokebridge.errors import MailboxError
from pokebridge.mailbox.base import HEADS_BATCH, in_parts
from pokebridge.session import UNKNOWN_VERSION
from pokebridge.wire import poke_frame

log = structlog.get_logger(__name__)

Heads = Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]

DOUBT_EVERY_S = 10.0
"""While the transport is in doubt: it may stay away for long, and pulls must go on."""
GRACE_S = 3.0
"""How long the poke of a new commit may still be on its way."""
STEP_S = 1.0
"""The time between two steps."""


class Verified(Protocol):
    """A session's socket, as far as the verification needs it."""

    @property
    def recipient(self) -> str:
        """Whose it is."""

    @property
    def is_open(self) -> bool:
        """Whether it has said ``ready`` and is not closing."""

    @property
    def is_closed(self) -> bool:
        """Whether it is gone for good."""

    @property
    def told(self) -> int:
        """The newest version that it was poked for, or ``UNKNOWN_VERSION``."""

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Send a poke or merge it; whether it was sent."""


class _Suspect(NamedTuple):
    session: Verified
    head: int
    look_again_at: float


class Verification:
    """Verifies every session in turn. Callers pass ``now`` in seconds of a monotonic clock.

    Attributes:
        is_blind: whether the mailbox did not answer last time.
        lost: sessions that were behind: their pokes were lost on the way.
    """

    def __init__(
        self, heads: Heads, every_s: float, is_busy: Callable[[str], bool] = lambda _: False
    ) -> None:
        """``is_busy``: whether the sessions of a recipient are being poked, a few at a time."""
        self._heads = heads
        self._every_s = every_s
        self._is_busy = is_busy
        self._queue: deque[Verified] = deque()
        self._suspects: deque[_Suspect] = deque()
        self._budget = 0.0
        self._stepped_at: float | None = None
        self.is_blind = False
        self.lost = 0

    def add(self, session: Verified) -> None:
        """Verify ``session`` from now on, for the first time within ``every_s``."""
        self._queue.append(session)

    async def step(self, now: float, *, in_doubt: bool) -> None:
        """Verify the sessions whose turn has come; to be called once in ``STEP_S``.

        A session that is not open yet keeps its turn: its pull at ``ready`` comes first. If the
        mailbox does not answer, the same sessions are first in line at the next step.
        """
        lost = self._settle_suspects(now)
        due = self._take_due(now, in_doubt=in_doubt)
        try:
            for start in range(0, len(due), HEADS_BATCH):
                await self._verify(due[start : start + HEADS_BATCH], now)
        except BaseException as error:  # whatever it was, none of them may be lost
            self.is_blind = True
            self._budget += len(due)
            self._queue.extendleft(reversed(due))
            if not isinstance(error, MailboxError):  # of which its own readiness check tells
                raise
        else:
            self.is_blind = self.is_blind and not due
            self._queue.extend(due)
        if lost:
            self.lost += lost
            log.warning("verification_found_lost_pokes", sessions=lost)

    def _take_due(self, now: float, *, in_doubt: bool) -> list[Verified]:
        every_s = min(self._every_s, DOUBT_EVERY_S) if in_doubt else self._every_s
        # A turn may come a step late, and so may the second look after the grace.
        every_s = max(every_s - 2 * STEP_S, every_s / 2)
        elapsed_s = 0.0 if self._stepped_at is None else now - self._stepped_at
        self._stepped_at = now
        total = len(self._queue)
        self._budget = min(self._budget + total * elapsed_s / every_s, total)
        turns = int(self._budget)
        self._budget -= turns
        due: list[Verified] = []
        while self._queue and len(due) < turns:
            session = self._queue.popleft()
            if not session.is_closed:  # a closed one costs no turn, or it would delay the others
                due.append(session)
        return due

    async def _verify(self, sessions: Sequence[Verified], now: float) -> None:
        told_before = [session.told for session in sessions]
        heads: dict[str, int] = {}

        async def look_up(recipients: Sequence[str]) -> None:
            heads.update(await self._heads(recipients))

        await in_parts(look_up, list({session.recipient for session in sessions}))
        for session, told in zip(sessions, told_before, strict=True):
            head = heads.get(session.recipient, 0)
            if not session.is_open or not head:
                continue
            if told > head:
                # A version that nobody has committed yet: what the client has is unknown again.
                session.notify(None, poke_frame(None))
            elif session.told == UNKNOWN_VERSION:
                # The client may well be up to date; with the version in hand it need not ask.
                session.notify(head, poke_frame(head))
            elif session.told < head:
                self._suspects.append(_Suspect(session, head, now + GRACE_S))

    def _settle_suspects(self, now: float) -> int:
        """Poke those that are still behind after the grace; how many there were."""
        lost = 0
        while self._suspects and self._suspects[0].look_again_at <= now:
            session, head, _ = self._suspects.popleft()
            if session.is_open and session.told < head and not self._is_busy(session.recipient):
                lost += session.told != UNKNOWN_VERSION
                session.notify(head, poke_frame(head))
        return lost
