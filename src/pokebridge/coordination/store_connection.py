"""What the adapters over a real store share: one connection, kept; and what is news to others."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import msgspec
import structlog

from pokebridge.coordination.base import Member
from pokebridge.errors import CoordinationError

# A call is over within this, whatever happened: sooner than the shortest lease one would run with
# in earnest, so that a member learns of an outage while its lease still lasts.
CALL_TIMEOUT_S = 4.0
DIAL_TIMEOUT_S = 3.0

C = TypeVar("C")
T = TypeVar("T")

log = structlog.get_logger(__name__)

encode = msgspec.json.Encoder().encode


def decode_all(decoder: msgspec.json.Decoder[T], records: Iterable[bytes | str]) -> list[T]:
    """What ``records`` hold, without those that are none: one bad record must not hide the rest."""
    decoded: list[T] = []
    for record in records:
        try:
            decoded.append(decoder.decode(record))
        except msgspec.MsgspecError as error:
            log.warning("a member's record is not understood", reason=str(error))
    return decoded


class StoreConnection(Generic[C]):
    """One connection to a store: dialled when a call needs it, given up at the first trouble.

    A call that failed, was cancelled or took too long leaves its connection in a state that nobody
    knows, so the next call dials anew. That is the one way back from a killed server, a cut cable
    and a store that lost what ``dial`` makes: tables, a bucket. Nothing is tried twice: a write
    that failed may have happened, and only the caller can tell what to do then.

    Args:
        name: how messages name the store; no secrets in it.
        dial: makes a connection that is ready for use.
        is_up: whether the driver still believes in the connection.
        hang_up: closes it, broken or not; soon, and without raising.
        failures: what the driver raises.
        text_of: the words of such an error, without secrets.
    """

    def __init__(
        self,
        name: str,
        *,
        dial: Callable[[], Awaitable[C]],
        is_up: Callable[[C], bool],
        hang_up: Callable[[C], Awaitable[None]],
        failures: tuple[type[Exception], ...],
        text_of: Callable[[Exception], str],
    ) -> None:
        self._name = name
        self._dial = dial
        self._is_up = is_up
        self._hang_up = hang_up
        self._failures: tuple[type[Exception], ...] = (*failures, OSError)
        self._text_of = text_of
        self._connection: C | None = None
        self._turn = asyncio.Lock()
        self._endings: set[asyncio.Future[None]] = set()
        self._closed = False

    async def call(self, work: Callable[[C], Awaitable[T]], *, waits_s: float = 0.0) -> T:
        """Do ``work`` on the connection, one call at a time.

        Args:
            work: what to do; it is cancelled after :data:`CALL_TIMEOUT_S`.
            waits_s: how much longer it may take, since it has the server wait.

        Raises:
            CoordinationError: the store does not answer, or refuses.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + waits_s), self._turn:
                connection = await self._connected()
                try:
                    return await work(connection)
                except BaseException:
                    self._give_up()
                    raise
        except TimeoutError:
            raise CoordinationError(f"{self._name}: no answer") from None
        except self._failures as error:
            raise CoordinationError(f"{self._name}: {self._text_of(error)}") from error

    async def close(self) -> None:
        """Close the connection; a call under way fails. May be called twice."""
        self._closed = True
        self._give_up()
        await asyncio.gather(*self._endings, return_exceptions=True)

    async def _connected(self) -> C:
        if self._connection is not None and not self._is_up(self._connection):
            self._give_up()
        if self._connection is None and not self._closed:
            self._connection = await self._dial()
        if self._closed or self._connection is None:  # perhaps while it was being dialled
            self._give_up()
            raise CoordinationError(f"{self._name}: closed")
        return self._connection

    def _give_up(self) -> None:
        if self._connection is not None:
            ending = asyncio.ensure_future(self._hang_up(self._connection))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            self._connection = None


class Announced:
    """Remembers what the others were told of members here; callers pass ``now`` in seconds."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[tuple[object, ...], float]] = {}

    def is_news(self, member: Member, now: float) -> bool:
        """Whether renewing ``member`` changes its standing, or brings it back from the dead."""
        standing, lasts_until = self._told.get(member.id, (None, now))
        return standing != member.standing or now >= lasts_until

    def note(self, member: Member, lasts_until: float) -> None:
        """``member`` was renewed, and told if it was news."""
        self._told[member.id] = (member.standing, lasts_until)

    def forget(self, member_id: str) -> None:
        """``member_id`` is one no more."""
        self._told.pop(member_id, None)
