"""Common to the adapters over a real store: a connection that is replaced when it breaks."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import msgspec
import structlog

from pokebridge.coordination.base import Member
from pokebridge.errors import ConfigError, CoordinationError

# The longest time a call takes. Shorter than any lease used in production, so that a member learns
# of an outage while its lease still lasts.
CALL_TIMEOUT_S = 4.0
DIAL_TIMEOUT_S = 3.0

C = TypeVar("C")
T = TypeVar("T")

log = structlog.get_logger(__name__)

encode = msgspec.json.Encoder().encode


def decode_all(decoder: msgspec.json.Decoder[T], records: Iterable[bytes | str]) -> list[T]:
    """Decode ``records`` without the invalid ones: one bad record must not hide the others."""
    decoded: list[T] = []
    for record in records:
        try:
            decoded.append(decoder.decode(record))
        except msgspec.MsgspecError as error:
            log.warning("coordination_record_invalid", reason=str(error))
    return decoded


class StoreConnection(Generic[C]):
    """One connection to a store: dialled when a call needs it, closed at the first failure.

    A call that failed, was cancelled or took too long leaves its connection in an unknown state, so
    the next call dials anew. This covers a killed server, a cut cable, and a store that lost the
    tables or the bucket that ``dial`` creates. No call is repeated: a write that failed may have
    taken effect, and only the caller knows what to do then.

    Args:
        name: the store's name in messages. Must not contain secrets.
        dial: returns a connection that is ready for use.
        is_up: whether the connection works, as far as the driver knows.
        hang_up: closes a connection, broken or not. Must be quick and must not raise.
        failures: the driver's exception classes.
        text_of: the text of such an exception, without secrets.
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
        self._has_connected = False
        # Held during a call.
        self._turn = asyncio.Lock()
        # Connections that are being closed.
        self._endings: set[asyncio.Future[None]] = set()
        self._closed = False

    async def call(self, work: Callable[[C], Awaitable[T]], *, waits_s: float = 0.0) -> T:
        """Call ``work`` with the connection, one call at a time.

        Args:
            work: cancelled after :data:`CALL_TIMEOUT_S`.
            waits_s: how much longer ``work`` may take because it makes the server wait.

        Raises:
            CoordinationError: the store does not answer, or refuses.
            ConfigError: the URL is invalid, or a file is unreadable, at the first connection.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + waits_s), self._turn:
                connection = await self._connected()
                try:
                    return await work(connection)
                except BaseException:
                    self._drop()
                    raise
        except TimeoutError:
            raise CoordinationError(f"{self._name}: no answer") from None
        except ConfigError as error:
            if not self._has_connected:
                raise
            # A file with credentials that can't be read now may be readable again later.
            raise CoordinationError(f"{self._name}: {error}") from error
        except self._failures as error:
            raise CoordinationError(f"{self._name}: {self._text_of(error)}") from error

    async def close(self) -> None:
        """Close the connection. A running call fails. Idempotent."""
        self._closed = True
        self._drop()
        await asyncio.gather(*self._endings, return_exceptions=True)

    async def _connected(self) -> C:
        if self._connection is not None and not self._is_up(self._connection):
            self._drop()
        if self._connection is None and not self._closed:
            self._connection = await self._dial()
            self._has_connected = True
        if self._closed or self._connection is None:  # possibly while dialling
            self._drop()
            raise CoordinationError(f"{self._name}: closed")
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            ending = asyncio.ensure_future(self._hang_up(self._connection))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            self._connection = None


class Announced:
    """Remembers which standing of each member was announced, and for how long it is valid.

    Callers pass the monotonic time ``now``, in seconds.
    """

    def __init__(self) -> None:
        self._told: dict[str, tuple[tuple[object, ...], float]] = {}

    def is_news(self, member: Member, now: float) -> bool:
        """Whether renewing ``member`` changes its standing, or begins a new lease."""
        standing, lasts_until = self._told.get(member.id, (None, now))
        return standing != member.standing or now >= lasts_until

    def note(self, member: Member, lasts_until: float) -> None:
        """Remember that ``member`` was renewed, and announced if it was news."""
        self._told[member.id] = (member.standing, lasts_until)

    def forget(self, member_id: str) -> None:
        """Forget ``member_id``, which has left."""
        self._told.pop(member_id, None)
