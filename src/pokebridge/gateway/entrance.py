"""The entrance of an instance: it admits sessions, and takes the tokens that they bring later.

HTTP upgrade → ``upgrade`` → [token] → ``Connection`` → ``on_admitted``: an answer and a place
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from math import inf
from typing import Protocol

import structlog

from pokebridge.backoff import spread
from pokebridge.border import note_unforeseen
from pokebridge.errors import AuthError, KeysUnavailableError, PokebridgeError, RefusedError
from pokebridge.forwarded import forwarded_for
from pokebridge.gateway.admission import Admission, retry_within
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.connection import Connection, ConnectionHost
from pokebridge.gateway.handshake import (
    Handshake,
    UpgradeRequest,
    client_address,
    is_trusted,
    read_handshake,
    refusal_response,
)
from pokebridge.gateway.listener import Listener
from pokebridge.gateway.listening import Listening
from pokebridge.gateway.polling import PolledSession, PollingHost
from pokebridge.gateway.sockets import Sockets
from pokebridge.session import Session, State
from pokebridge.supervisor import run_once
from pokebridge.tokens import unverified_subject
from pokebridge.wire import Listen, unlistened_frame

log = structlog.get_logger(__name__)
# Knows at once whether a level is logged. structlog takes 8 us to find out, for every session.
_logger = logging.getLogger(__name__)

# Not the loop's clock, which does not advance during a turn of the loop: after a long turn it would
# jump, and admit too many handshakes.
_clock = time.monotonic


class Identity(Protocol):
    """What a valid token says: who its bearer is, and until when."""

    @property
    def subject(self) -> str:
        """The recipient."""

    @property
    def expires_at(self) -> float:
        """Unix time in seconds."""


class Verifier(Protocol):
    """Verifies tokens."""

    def verify_now(self, token: str) -> Identity:
        """The identity behind ``token``, without waiting.

        Raises:
            KeysUnavailableError: the key of the token has to be fetched first; see ``verify``.
            AuthError: the token is not valid.
        """

    async def verify(self, token: str) -> Identity:
        """The same, but fetches the key when necessary.

        Raises:
            KeysUnavailableError: the key can't be fetched now.
            AuthError: the token is not valid.
        """


class Host(ConnectionHost, PollingHost, Protocol):
    """What sessions of either kind need from the gateway that they belong to."""

    def forget(self, connection: Connection | PolledSession) -> None:
        """The session is over."""


class Entrance:
    """Answers upgrade requests, and verifies the further tokens of open sessions."""

    serves = False
    """Whether this instance takes sessions at all. Otherwise each request is answered with 404."""
    connection_type = Connection
    """What the socket of each session becomes."""

    def __init__(
        self,
        config: GatewayConfig,
        verifier: Verifier,
        host: Host,
        on_admitted: Callable[[Connection, Handshake], None],
    ) -> None:
        """``on_admitted`` is called with each new connection, and answers its handshake."""
        self.handshakes: Counter[str] = Counter()
        """Handshakes by the HTTP status that they were answered with."""
        self._config = config
        self._verifier = verifier
        self._host = host
        self._on_admitted = on_admitted
        self._admission = Admission(
            handshakes_per_s=config.handshakes_per_s,
            max_sessions=config.max_sessions,
            max_sessions_per_address=config.max_sessions_per_address,
        )
        self.sockets = Sockets(
            at_most=config.max_sockets,
            at_most_per_address=config.max_connections_per_address,
            sessions=lambda: self.sessions - self.polled,
        )
        """The HTTP connections, of which some become sessions."""
        self.polled = 0
        """How many sessions have no socket of their own."""
        # Those of them that last for several calls, by their ids.
        self._lasting: dict[str, PolledSession] = {}
        # Verifications that wait for a key.
        self._tasks: set[asyncio.Task[None]] = set()
        # Those of them that a `listen` waits for, by the recipient that is meant.
        self._listens_later: dict[tuple[Connection | PolledSession, str | None], Listen] = {}

    @property
    def sessions(self) -> int:
        """The sessions that count against the limits: those that are ending do, too."""
        return self._admission.sessions

    @property
    def draining(self) -> bool:
        """Whether new sessions are refused because this instance is about to stop."""
        return self._admission.draining

    def shut(self) -> None:
        """Refuse new sessions from now on. Open sessions are not affected."""
        self._admission.draining = True

    def close(self) -> None:
        """Refuse new sessions, and stop verifying the tokens that wait for a key."""
        self.shut()
        for task in self._tasks:
            task.cancel()

    # --- new sessions -------------------------------------------------------------------------

    def upgrade(
        self, transport: asyncio.Transport, request: UpgradeRequest, hand_over: Callable[[], None]
    ) -> None:
        """Answer an upgrade request.

        ``hand_over`` is called just before the transport becomes the connection's. Until then the
        transport and the request's deadline are the caller's. That is at once, unless a key must
        be fetched first; reading is paused meanwhile.
        """
        admission, config = self._admission, self._config
        address = client_address(
            request.peer, forwarded_for(request.headers), config.trusted_proxies
        )
        if not self.serves:
            absent = RefusedError(HTTPStatus.NOT_FOUND, "this instance takes no sessions")
            self._refuse(transport, address, absent)
            return
        try:
            admission.check_handshake(address, _clock())
            handshake = read_handshake(
                request,
                address=address,
                allowed_origins=config.allowed_origins,
                is_proxied=is_trusted(request.peer, config.trusted_proxies),
            )
            admission.check_session(address)
            identity = self._verifier.verify_now(handshake.token)
            admission.pass_handshake(_clock())
        except KeysUnavailableError:
            transport.pause_reading()
            admission.enter(address)
            self._spawn("handshake", self._upgrade_later(transport, handshake, hand_over))
        except Exception as error:  # noqa: BLE001 - the guard of this border
            self._refuse(transport, address, error)
        else:
            self._accept(transport, handshake, identity, hand_over)

    def admit(self, address: str) -> str:
        """Count a session whose handshake another process has checked, if it is within the limits.

        Returns the address that it counts against; ``left`` must be called at its end.

        Raises:
            RefusedError: a limit is reached, or this instance drains.
        """
        now = _clock()
        self._admission.check_handshake(address, now)
        self._admission.check_session(address)
        self._admission.pass_handshake(now)
        return self._admission.enter(address)

    def turned_away(self, status: int) -> None:
        """A handshake that was valid here is refused with ``status`` after all."""
        self.handshakes["101"] -= 1
        self.handshakes[str(status)] += 1

    def left(self, session: Listener) -> None:
        """A session that was admitted has ended: it no longer counts against the limits."""
        self._admission.leave(session.address)
        if isinstance(session, PolledSession):
            self.polled -= 1
            self._lasting.pop(session.session.id, None)

    async def _upgrade_later(
        self, transport: asyncio.Transport, handshake: Handshake, hand_over: Callable[[], None]
    ) -> None:
        address = handshake.address
        try:
            try:
                identity = await self._verifier.verify(handshake.token)
            finally:
                self._admission.leave(address)
            # All clients that waited for the key continue at once, and a drain may have begun.
            self._admission.check_handshake(address, _clock())
            self._admission.check_session(address)
            self._admission.pass_handshake(_clock())
        except Exception as error:  # noqa: BLE001 - the guard of this border
            self._refuse(transport, address, error)
        else:
            if not transport.is_closing():
                self._accept(transport, handshake, identity, hand_over)

    def _refuse(self, transport: asyncio.Transport, address: str, error: Exception) -> None:
        if not isinstance(error, PokebridgeError):
            note_unforeseen("handshakes", error)
            error = PokebridgeError("a defect of the server: see its log")
        headers = error.headers if isinstance(error, RefusedError) else {}
        if isinstance(error, KeysUnavailableError):
            headers = retry_within(2, 10)
        elif isinstance(error, AuthError):
            if self._admission.note_stranger(address, _clock()):
                headers = {"WWW-Authenticate": "Bearer"}
            else:
                error = RefusedError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    "too many handshakes without a valid token from this address",
                )
                headers = retry_within(5, 15)
        self.handshakes[str(int(error.status))] += 1
        transport.write(refusal_response(error.status, str(error), headers))
        transport.close()

    def _accept(
        self,
        transport: asyncio.Transport,
        handshake: Handshake,
        identity: Identity,
        hand_over: Callable[[], None],
    ) -> None:
        session = self._session(identity, handshake.device)
        counted = self._admission.enter(handshake.address)
        connection = self.connection_type(self._host, transport, session, counted)
        self.handshakes["101"] += 1
        if _logger.isEnabledFor(logging.DEBUG):
            log.debug("session_accepted", session=session.id, device=session.device)
        hand_over()
        connection.begin()
        self._on_admitted(connection, handshake)

    def _session(self, identity: Identity, device: str) -> Session:
        now = self._host.now()
        return Session(
            identity.subject,
            device,
            secrets.token_hex(8),
            expires_at=self._on_the_loops_clock(identity.expires_at),
            now=now,
            timing=self._config.timing,
            ends_at=self._end_of_session(now),
        )

    def _end_of_session(self, now: float) -> float:
        if self._config.max_session_s == inf:
            return inf  # one shared object, which costs no memory per session
        # Sessions that began together must not end together.
        return now + spread(self._config.max_session_s, 0.8, 1.0)

    # --- sessions without a socket ------------------------------------------------------------

    def admit_polled(
        self, identity: Identity, device: str, address: str, *, lasts: bool
    ) -> PolledSession:
        """Admit a session without a socket, as if it came with a handshake.

        Raises:
            RefusedError: this instance takes no sessions, or no more now.
        """
        if not self.serves:
            raise RefusedError(HTTPStatus.NOT_FOUND, "this instance takes no sessions")
        self._admission.check_handshake(address, _clock())
        self._admission.check_session(address)
        self._admission.pass_handshake(_clock())
        counted = self._admission.enter(address)
        self.polled += 1
        session = self._session(identity, device)
        polled = PolledSession(self._host, session, counted, identity.expires_at, lasts=lasts)
        if lasts:
            self._lasting[session.id] = polled
        return polled

    def find_polled(self, session_id: str, identity: Identity) -> PolledSession | None:
        """The session without a socket that has this id, if it is the caller's.

        The caller's token may be a newer one than before.
        """
        polled = self._lasting.get(session_id)
        if polled is None or polled.recipient != identity.subject:
            return None
        if identity.expires_at > polled.token_expires_at and polled.is_open:
            expires_at = self._on_the_loops_clock(identity.expires_at)
            polled.renew(expires_at, identity.expires_at)
        return polled

    # --- renewed tokens -----------------------------------------------------------------------

    def renew(self, connection: Connection, token: str) -> None:
        """The client of ``connection`` has sent a new token."""
        try:
            identity = self._verifier.verify_now(token)
        except KeysUnavailableError:
            self._spawn("token_renewal", self._renew_later(connection, token))
        except AuthError as error:
            connection.close(error.close_code, str(error))
        else:
            self._renewed(connection, identity)

    async def _renew_later(self, connection: Connection, token: str) -> None:
        try:
            identity = await self._verifier.verify(token)
        except KeysUnavailableError:
            # An outage of the key server ends no session: the old token stays valid.
            log.warning("token_renewal_without_keys", session=connection.session.id)
        except AuthError as error:
            connection.close(error.close_code, str(error))
        else:
            self._renewed(connection, identity)

    def _renewed(self, connection: Connection, identity: Identity) -> None:
        if identity.subject != connection.recipient:
            connection.close(4403, "a new token must be of the same recipient")
        elif connection.session.state is State.OPEN:
            connection.renew(self._on_the_loops_clock(identity.expires_at))

    # --- further recipients -------------------------------------------------------------------

    def listen(self, connection: Connection | PolledSession, wanted: Listen) -> None:
        """The client of ``connection`` wants to hear the recipient of a token."""
        if not connection.is_open:
            return
        if not connection.session.may_listen():
            self._end_listening(connection, wanted.recipient, 1013, "too many `listen`s just now")
            return
        try:
            identity = self._verifier.verify_now(wanted.token)
        except KeysUnavailableError:
            self._listens_later[connection, _meant(wanted)] = wanted
            self._spawn("listen", self._listen_later(connection, wanted))
        except AuthError as error:
            self._refuse_to_listen(connection, wanted.recipient, error)
        else:
            self._listen(connection, wanted, identity)

    def unlisten(self, connection: Connection | PolledSession, recipient: str) -> None:
        """The client of ``connection`` need not hear ``recipient`` any more."""
        self._listens_later.pop((connection, recipient), None)
        listened = (connection.session.listened or {}).get(recipient)
        if isinstance(listened, Listening):
            listened.abort()

    async def _listen_later(self, connection: Connection | PolledSession, wanted: Listen) -> None:
        try:
            identity = await self._verifier.verify(wanted.token)
        except AuthError as error:
            if self._is_still_wanted(connection, wanted):
                self._refuse_to_listen(connection, wanted.recipient, error)
        else:
            if self._is_still_wanted(connection, wanted):
                self._listen(connection, wanted, identity)

    def _is_still_wanted(self, connection: Connection | PolledSession, wanted: Listen) -> bool:
        key = (connection, _meant(wanted))
        if self._listens_later.get(key) is not wanted:
            return False  # the client has changed its mind meanwhile
        del self._listens_later[key]
        return connection.is_open

    def _refuse_to_listen(
        self, connection: Connection | PolledSession, recipient: str | None, error: AuthError
    ) -> None:
        """Send the reason. Listening to that recipient ends, unless no key can be fetched now."""
        is_heard = recipient in (connection.session.listened or {})
        if is_heard and isinstance(error, KeysUnavailableError):
            log.warning("token_renewal_without_keys", session=connection.session.id)
        else:
            self._end_listening(connection, recipient, error.close_code, str(error))

    def _end_listening(
        self, connection: Connection | PolledSession, recipient: str | None, code: int, reason: str
    ) -> None:
        """Say that ``recipient`` is not heard, or no longer."""
        listened = (connection.session.listened or {}).get(recipient or "")
        if isinstance(listened, Listening):
            listened.close(code, reason)
        else:
            connection.send(unlistened_frame(recipient, code, reason))

    def _listen(
        self, connection: Connection | PolledSession, wanted: Listen, identity: Identity
    ) -> None:
        session, recipient = connection.session, identity.subject
        expires_at = self._on_the_loops_clock(identity.expires_at)
        listened = session.listened or {}
        if wanted.recipient not in {None, recipient}:
            refusal = "the token is of another recipient"
        elif recipient == session.recipient:
            refusal = "the session is of this recipient, and hears it without `listen`"
        elif isinstance(known := listened.get(recipient), Listening):
            known.extend(expires_at)
            return
        elif len(listened) >= session.listens_at_most:
            refusal = f"a session listens to at most {session.listens_at_most} recipients"
        else:
            self._host.hear(Listening(self._host, connection, recipient, expires_at))
            return
        self._end_listening(connection, wanted.recipient or recipient, 4403, refusal)

    def _on_the_loops_clock(self, unix_s: float) -> float:
        return self._host.now() + (unix_s - time.time())

    def _spawn(self, name: str, coroutine: Coroutine[None, None, None]) -> None:
        task = run_once(name, coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _meant(wanted: Listen) -> str | None:
    """The recipient that ``wanted`` names, or else its token, which is not verified yet."""
    return wanted.recipient or unverified_subject(wanted.token)
