"""Sessions without a socket: their clients fetch the frames with HTTP calls that wait.

Some networks let no WebSocket pass. To the bridge such a client is a session like any other: it is
in the session map, where a poke finds it. While no call waits, the session is like one whose peer
does not read, so pokes merge into its one slot. A call that waits is answered with that slot.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import structlog

from pokebridge.backoff import spread
from pokebridge.errors import AuthError, ConflictError, PokebridgeError
from pokebridge.framing import decode_close
from pokebridge.gateway.listener import HasSession
from pokebridge.gateway.listening import ListeningHost
from pokebridge.session import UNKNOWN_VERSION, Session, State
from pokebridge.wire import POKE_FRAME, frame_text, move_frame

log = structlog.get_logger(__name__)

T = TypeVar("T")

PROOF_WITHIN_S = 2.0
"""How long a pull waits for its recipient's subscription to be proven. Then it answers at once."""
# A call waits for at most this share of the time that its token has left.
_TOKEN_SHARE = 0.75
# The error that answers a pull, by the close code with which its session ends.
_ERRORS: dict[int, type[PokebridgeError]] = {4401: AuthError, 4409: ConflictError}


class Ending(NamedTuple):
    """Why a session has ended: a close code of docs/protocol.md, and the reason for people."""

    code: int
    reason: str


class PollingHost(ListeningHost, Protocol):
    """What a polled session needs from the gateway that it belongs to."""

    instance: str
    """The instance's id."""

    def forget(self, polled: "PolledSession") -> None:
        """The session has ended."""


class _Delay(msgspec.Struct):
    within_ms: float = 0


_decode_delay = msgspec.json.Decoder(_Delay).decode


class PolledSession(HasSession):
    """One session whose client asks for its frames, one call after the other.

    - ``session``: its state
    - ``address``: the address that it counts against; empty when there is no such limit
    - ``began_at``: when it began, in Unix seconds, rounded down
    - ``token_expires_at``: Unix time in seconds
    - ``lasts``: whether it is for more than one call
    - ``ending``: why it has ended; ``None`` as long as it has not
    - ``wheel_slot``: a note of the wheel's
    - ``_counted_until``: when the client's frames are counted anew
    - ``_frames``: what the next call gets beside a poke
    - ``_owes_poke``: whether the next call gets a poke that names no version
    - ``_call``: resolved when the call that waits is to be answered; ``None`` when none waits
    - ``_answer_at``: when that call is answered at the latest
    - ``_is_forgotten``: whether the host knows that it has ended
    """

    __slots__ = (
        *("_answer_at", "_call", "_counted_until", "_frames", "_host", "_is_forgotten"),
        *("_owes_poke", "address", "began_at", "ending", "lasts", "session"),
        *("token_expires_at", "wheel_slot"),
    )

    def __init__(
        self,
        host: PollingHost,
        session: Session,
        address: str,
        token_expires_at: float,
        *,
        lasts: bool,
    ) -> None:
        self.session = session
        self.lasts = lasts
        self.address = address
        self.began_at = int(time.time())
        self.token_expires_at = token_expires_at
        self.ending: Ending | None = None
        self.wheel_slot = 0
        self._host = host
        self._counted_until = -inf
        self._frames: list[bytes] = []
        self._owes_poke = False
        self._call: asyncio.Future[None] | None = None
        self._answer_at = inf
        self._is_forgotten = False
        session.block(host.now())
        self._follow()

    @property
    def is_awaited(self) -> bool:
        """Whether a call waits for the next frame."""
        return self._call is not None and not self._call.done()

    async def fetch(self, wait_s: float) -> Sequence[bytes]:
        """The frames for the client, as JSON. Waits up to ``wait_s`` seconds for the first.

        Returns nothing when the time is up, when a newer call replaces this one, and when the
        session ends without a frame; ``ending`` then says why. After each call the session stays
        for ``pong_timeout_s``, and ends if no other call comes.
        """
        self._answer()
        self._call = None  # an older call has nothing more to take
        self._read_on()
        if wait_s > 0 and not (self._frames or self._owes_poke or self.is_closed):
            call = self._call = asyncio.get_running_loop().create_future()
            self._answer_at = self._host.now() + self._bounded(wait_s)
            self._follow()
            await call
            if self._call is not call:
                return ()
            self._call, self._answer_at = None, inf
            self._read_on()
        return self._take()

    async def read_when_new(
        self,
        wait_s: float,
        verify_every_s: float,
        read: Callable[[], Awaitable[T]],
        is_news: Callable[[T], bool],
    ) -> T:
        """What ``read`` returns: at once if that is new, else after a poke or ``wait_s`` seconds.

        It waits only while the recipient's subscription is proven live, and ends the session. It
        reads every ``verify_every_s`` seconds, in case a poke was lost.

        Raises:
            AuthError: the token has expired, or was revoked meanwhile.
            ConflictError: newer sessions of the recipient have taken this one's place.
        """
        now = self._host.now
        ends_at = now() + self._bounded(wait_s)
        try:
            # The session is in the map by now. What is committed before this read is seen by it,
            # and what is committed later pokes it, if the subscription was live already.
            was_live = self.is_open
            found = await read()
            if not (was_live or is_news(found)):
                if not self.is_open:
                    await self.fetch(min(wait_s, PROOF_WITHIN_S))
                found = await read()
            frames: Sequence[bytes] = ()
            while self.is_open and not (frames or is_news(found)) and now() < ends_at:
                frames = await self.fetch(min(ends_at - now(), verify_every_s))
                found = await read()
        finally:
            self.abort()
        if self.ending is not None and self.ending.code in _ERRORS:
            raise _ERRORS[self.ending.code](self.ending.reason)
        return found

    def _bounded(self, wait_s: float) -> float:
        """``wait_s``, or less: so that the next call brings a new token before this one expires."""
        return min(wait_s, max(0.0, self.token_expires_at - time.time()) * _TOKEN_SHARE)

    def _read_on(self) -> None:
        """A call is here, so the session's slot is read."""
        poke = self.session.drain(self._host.now())
        if poke and not self._owes_poke:
            self._frames.append(poke)
        self._frames += self.session.drain_listened()

    def _take(self) -> Sequence[bytes]:
        frames = [frame_text(frame) for frame in self._frames]
        if self._owes_poke:
            frames.append(frame_text(POKE_FRAME))
        self._frames, self._owes_poke = [], False
        if self.is_closed:
            self.abort()
        else:
            self.session.block(self._host.now())
            self._follow()
        return frames

    def answer(self, response: bytes) -> None:
        """There is no handshake. The call waits for ``ready``."""

    def open(self, first_ping_s: float, response: bytes = b"") -> None:  # noqa: ARG002 - that of a Listener
        """Say ``ready`` with the call that waits, or the next one.

        A session for one call needs no ``ready``: the call reads what is there when it begins.
        """
        if self.session.state is State.WAITING:
            now = self._host.now()
            ready = self.session.open(
                instance=self._host.instance, now=now, first_ping_s=first_ping_s
            )
            if self._call is None:
                self.session.block(now)
            if self.lasts:
                self._frames.append(ready)
            self._follow()
            self._answer()

    def notify(self, version: int | None, frame: bytes) -> bool:
        """Answer the call that waits, or keep the poke. Returns whether a call is answered.

        For a poke with a delay, the call waits in the client's place. So the answers to many
        clients are spread, too.
        """
        session = self.session
        if version is None:
            session.told = UNKNOWN_VERSION
        elif version > session.told:
            session.told = version
        if not (self.is_awaited and session.flows):
            session.poke(version)
            return False
        if b'"within_ms"' in frame:
            delay_s = _decode_delay(frame_text(frame)).within_ms / 1000
            self._owes_poke = True
            self._answer_at = min(self._answer_at, self._host.now() + spread(delay_s, 0.0, 1.0))
            self._follow()
        else:
            session.block(self._host.now())
            session.poke(version)
            self._answer()
        return True

    def send(self, frame: bytes) -> None:
        """Send ``frame`` with the call that waits, or with the next one."""
        self._frames.append(frame)
        if self.is_awaited:
            self.session.block(self._host.now())
            self._answer()

    def hear(self) -> bool:
        """Count a frame from the client. Ends the session, and returns False, after too many.

        They are counted for a ping interval. There may be no ping, because a client whose calls
        follow each other is known to be alive.
        """
        now = self._host.now()
        if now >= self._counted_until:
            self._counted_until = now + self.session.ping_interval_s
            self.session.count_anew()
        if self.session.hear():
            return True
        self.close(1008, "too many frames")
        return False

    def renew(self, expires_at: float, token_expires_at: float) -> None:
        """A new token was used. It expires at ``expires_at`` on the loop's clock."""
        self.token_expires_at = token_expires_at
        self._frames.append(self.session.renew(expires_at=expires_at, now=self._host.now()))
        self._follow()

    def close(self, code: int, reason: str) -> None:
        """End the session with the call that waits, or the next one."""
        if self.session.close(code, reason, self._host.now()):
            self._end_with(Ending(code, reason))

    def move(self, url: str) -> None:
        """Send the client to another instance."""
        if not self.is_closed:
            self._frames.append(move_frame(url))
            self.close(4307, "moved")

    def abort(self) -> None:
        """The client is gone, or knows that the session ends."""
        self.session.state = State.CLOSED
        self._answer()
        if not self._is_forgotten:
            self._is_forgotten = True
            self._host.forget(self)

    def wake(self, now: float) -> None:
        """The deadline of the session, or that of the call that waits, has passed."""
        if self.is_awaited and now >= self._answer_at:
            self._answer()
            return
        frame = self.session.tick(now)
        if self.session.state is State.CLOSED:
            self.abort()
        elif self.session.state is State.CLOSING and frame:  # without one it is just closing
            closing = frame_text(frame)
            self._end_with(Ending(decode_close(closing) or 1006, closing[2:].decode()))
        else:
            self.session.pong(now)  # a call that waits shows that the client is there
            self._follow()

    def _end_with(self, ending: Ending) -> None:
        log.info("session_closing", session=self.session.id, **ending._asdict())
        self.ending = ending
        self._follow()
        self._answer()

    def _answer(self) -> None:
        if self._call is not None and not self._call.done():
            self._call.set_result(None)
            self._answer_at = inf

    def _follow(self) -> None:
        """Schedule the next deadline."""
        self._host.wheel.schedule(self, min(self.session.due_at, self._answer_at))
