"""The rules of a client as a pure state machine; docs/protocol.md defines them.

:class:`ClientCore` takes events, each with the time and a random number, and returns the actions to
carry out. After each event ``timer`` says when the next :class:`Tick` is due. It has no clock,
socket or randomness, so a simulator can run it on virtual time. The JSON of ``tests/vectors`` is
exactly these events and actions, so that clients in other languages can be tested against it.

Four activities run side by side. The **socket** is kept open: after it is lost, a new one is opened
after a delay with full jitter. The **token** is fetched before the first connection, before it
expires, and when it was refused. **Pulls** follow pokes, one at a time, and are retried until one
succeeds. The client also pulls on a timer: slowly without a socket, very slowly with one. **Acks**
follow pulls: if the socket accepts acks, the cursor is acked after a pull, unless this socket has
carried that ack already. So an ack that was lost with its socket is repeated.
"""

from enum import Enum
from math import inf
from typing import Any

from pokebridge.client.events import (
    Abandon,
    Ack,
    AnyAction,
    AnyEvent,
    Authenticate,
    Closed,
    Connect,
    Disconnect,
    FetchToken,
    Opened,
    Ping,
    Pull,
    Pulled,
    PullFailed,
    Refused,
    Start,
    Stop,
    Text,
    Token,
    TokenFailed,
    Try,
    TryFailed,
    Upgraded,
    Wake,
)
from pokebridge.client.frames import asked_s, number, parse_frame, version_of
from pokebridge.client.policy import Policy
from pokebridge.client.pulls import Pulls
from pokebridge.client.transports import YOUNG_S, Transport, Transports

CLOSE_MOVED = 4307
CLOSE_TOKEN = 4401
CLOSE_FORBIDDEN = 4403
CLOSE_OVERLOAD = 1013
CLOSE_ABNORMAL = 1006  # RFC 6455, section 7.4.1: no close frame came


# A token is renewed this long before it runs out, or a quarter of its life if that is shorter.
TOKEN_LEAD_S = 60.0
# Between two renewals, in case the provider keeps handing out the same old token.
MIN_TOKEN_REST_S = 5.0


class _Socket(Enum):
    DOWN = "down"
    CONNECTING = "connecting"
    READY = "ready"


class ClientCore:
    """The state machine of one client.

    Args:
        url: the WebSocket address, ``wss://…/v1/connect``.
        cursor: the version up to which all messages are handled already.
        policy: the delays.
        transport: by what it connects.
    """

    def __init__(
        self,
        url: str,
        *,
        cursor: int = 0,
        policy: Policy | None = None,
        transport: Transport = "websocket",
    ) -> None:
        self._url = url
        self._policy = policy = policy or Policy()
        self._transports = Transports(
            transport, try_base_s=policy.try_base_s, try_cap_s=policy.try_cap_s
        )
        self._polls = False  # whether the socket is polled
        self._try_until = inf  # when the WebSocket that is being tried is given up
        self._pulls = Pulls(cursor)
        self.stopped = False

        self._socket = _Socket.DOWN
        self._is_open = False  # the handshake is done
        self._failures = 0
        self._connect_at = inf
        self._give_up_at = inf
        self._ready_since = inf
        self._ping_at = self._pong_by = inf
        self._poll_at = inf
        self._takes_acks = False  # as the server said in ``ready``
        self._acked, self._acked_at = 0, -inf  # the version that this socket has carried, and when
        self._ack_at = inf
        self._move_url: str | None = None  # announced, for when the socket closes with 4307
        self._next_url: str | None = None  # where to connect next, for once
        self._moved = False
        self._led = False  # to where a move said, and not ready there yet
        self._stranded = False  # nobody was there: whoever takes us now should keep us

        self._has_token = False
        self._fetching = False
        self._fetch_at = inf
        self._fetch_failures = 0
        self._refusals = 0
        self._refused_at = -inf
        # The tokens are numbered: the newest, the socket's, and that of the running pull.
        self._token = 0
        self._socket_token = 0
        self._try_token = 0
        self._pull_token = 0

        # Of the event that is being handled.
        self._now = 0.0
        self._random = 0.0
        self._actions: list[AnyAction] = []

    @property
    def cursor(self) -> int:
        """The version up to which all messages are handled."""
        return self._pulls.cursor

    @property
    def ready(self) -> bool:
        """Whether a socket is open and the bridge has sent ``ready``."""
        return self._socket is _Socket.READY

    @property
    def polls(self) -> bool:
        """Whether frames are polled over HTTP, because no WebSocket gets through."""
        return self._polls and self._socket is not _Socket.DOWN

    @property
    def acks_by_socket(self) -> bool:
        """Whether the socket takes acks, so that a pull leaves its ack to it."""
        return self.ready and self._takes_acks

    @property
    def waiting_ack(self) -> int | None:
        """The version of an ack whose time has not come: a client that leaves should send it."""
        return None if self._ack_at == inf else self.cursor

    @property
    def timer(self) -> float | None:
        """When the next :class:`Tick` is due, or ``None`` if another event has to come first."""
        if self.stopped:
            return None
        times = [self._give_up_at, self._ping_at, self._pong_by, self._poll_at, self._ack_at]
        times.append(self._next_try())
        if not self._fetching:
            times.append(self._fetch_at)
        if self._has_token:
            times += [self._connect_at, self._pulls.due_at]
        earliest = min(times)
        return None if earliest == inf else earliest

    def handle(self, event: AnyEvent, *, now: float, random: float) -> list[AnyAction]:
        """Return the actions to carry out for ``event``, in order. After a :class:`Stop`: none.

        ``now`` is the time in seconds, and ``random`` a uniform random number in [0, 1).
        """
        if self.stopped:
            return []
        self._now, self._random, self._actions = now, random, []
        match event:  # what is due by now is done after any event, as after a tick
            case Opened() | Text() | Closed() | Refused():
                if self._socket is not _Socket.DOWN:
                    self._on_socket(event)
            case Upgraded() | TryFailed():
                self._on_try(event)
            case Token() | TokenFailed():
                self._on_token(event)
            case Pulled() | PullFailed():
                self._on_pull(event)
            case Start():
                self._fetch_at = self._connect_at = now
                self._poll_soon()
            case Wake():
                self._on_wake()
        if not self.stopped:
            self._do_what_is_due()
        return self._actions

    def _do_what_is_due(self) -> None:
        now = self._now
        if min(self._give_up_at, self._pong_by) <= now:
            # Something in between may hold back its frames. The longer it took, the more it counts.
            gives_up = self._give_up_at <= now
            self._judge_failure(1 + gives_up + (gives_up and self._is_open), silent=True)
            self._actions.append(Disconnect())
            self._lose_socket()
            self._reconnect_later()
        elif self._ping_at <= now:
            self._actions.append(Ping())
            self._ping_at = inf
            self._pong_by = now + self._policy.pong_within_s
        if self._next_try() <= now:
            self._try_or_abandon()
        if self._ack_at <= now:
            self._actions.append(Ack(self.cursor))
            self._acked, self._acked_at, self._ack_at = self.cursor, now, inf
        if self._poll_at <= now:
            self._pulls.want(now)
            self._poll_later()
        if self._fetch_at <= now and not self._fetching:
            self._actions.append(FetchToken())
            self._fetching = True
            self._fetch_at = inf
        if self._connect_at <= now and self._has_token:
            self._connect()
        if self._pulls.due_at <= now and self._has_token:
            self._actions.append(Pull(self.cursor))
            self._pulls.start()
            self._pull_token = self._token

    # --- the socket ---

    def _on_socket(self, event: Opened | Text | Closed | Refused) -> None:
        match event:
            case Opened():
                self._is_open = True
                if not self._polls:
                    self._transports.opened()
                self._give_up_at = self._now + self._policy.ready_within_s
            case Text(text=text):
                if self.ready:
                    self._ping_at = self._now + self._policy.ping_after_s
                    self._pong_by = inf
                self._on_frame(parse_frame(text))
            case Closed(code=code):
                self._on_closed(code)
            # The instance that a move named may have other keys or another clock: go back.
            case Refused(status=401) if not self._led:
                self._on_closed(CLOSE_TOKEN)
            case Refused(status=403) if not self._led:
                self._on_closed(CLOSE_FORBIDDEN)
            case Refused(retry_after_s=retry_after_s):
                if self._polls:
                    self._judge_failure()
                self._lose_socket()
                self._reconnect_later(asked_s=asked_s(retry_after_s))

    def _on_frame(self, frame: dict[str, Any]) -> None:
        match frame:
            case {"type": "ready"}:
                self._takes_acks, self._acked = frame.get("acks") is True, 0
                self._on_ready()
                self._renew_token_before(frame.get("expires_in"))
            case {"type": "auth"}:
                self._renew_token_before(frame.get("expires_in"))
            case {"type": "poke"}:
                delay_s = self._random * asked_s(frame.get("within_ms"), unit_s=0.001)
                self._pulls.want(self._now + delay_s, version_of(frame.get("version")))
            case {"type": "move", "url": str(url)}:
                # The token goes there too, so never in the clear where it was not so before.
                if url.startswith("wss://") or self._url.startswith("ws://"):
                    self._move_url = url

    def _on_ready(self) -> None:
        self._socket = _Socket.READY
        if self._polls:
            self._transports.poll_ready(self._now, self._random)
        self._led = self._stranded = False
        self._ready_since = self._now
        self._give_up_at = inf
        self._poll_later()
        self._ping_at = self._now + self._policy.ping_after_s
        # The server answers again, so an earlier failure is no reason to wait any more.
        self._pulls.retry_now()
        # Whatever version the frame knows: it may have been read before the subscription was live.
        self._pulls.want(self._now)
        if self._socket_token != self._token:
            self._authenticate()

    def _on_closed(self, code: int) -> None:
        # Sent on before it was served is a circle; once served, a shard may move as it must.
        moved_again = self._moved and not self.ready
        if self._now - self._ready_since >= YOUNG_S and not self._polls:
            self._transports.lasted()
        elif code == CLOSE_ABNORMAL:
            self._judge_failure()
        self._lose_socket()
        if code == CLOSE_TOKEN:
            self._connect_at = self._now
            self._on_token_refused(self._socket_token)
        elif 4400 <= code <= 4499:
            self.stopped = True
            self._actions.append(Stop(code))
        elif code == CLOSE_MOVED and self._move_url and not moved_again:
            self._next_url = self._move_url
            self._connect_at = self._now
        else:
            self._reconnect_later(overload=code == CLOSE_OVERLOAD)

    def _judge_failure(self, weight: int = 1, *, silent: bool = False) -> None:
        """The socket failed without an answer from the bridge: WebSockets may be blocked here."""
        if self._polls:
            if not self.ready:
                self._transports.poll_failed()
        elif silent or self._now - self._ready_since < YOUNG_S:
            self._transports.failed(weight)

    def _is_stable(self) -> bool:
        return self._now - self._ready_since >= self._policy.stable_s

    def _lose_socket(self) -> None:
        if self._is_stable():
            self._failures = 0
        if self.ready:
            self._poll_soon()
        self._socket = _Socket.DOWN
        self._is_open = False
        self._ready_since = self._give_up_at = self._ping_at = self._pong_by = self._ack_at = inf

    def _reconnect_later(self, *, asked_s: float = 0, overload: bool = False) -> None:
        if self._led:
            # The owner that we were sent to may have died a moment ago, or refuses us. Its
            # successor is not known yet, so go back at once and say that we were moved: then we
            # are served.
            self._led, self._stranded = False, True
            self._connect_at = self._now
            return
        policy = self._policy
        if overload:
            delay_s = self._jitter(self._failures, policy.overload_base_s, policy.overload_cap_s)
        else:
            delay_s = self._jitter(self._failures, policy.base_s, policy.cap_s)
        self._failures += 1
        self._connect_at = self._now + asked_s + delay_s

    def _connect(self) -> None:
        self._led = self._next_url is not None
        self._moved = self._led or self._stranded
        self._polls = self._transports.polls
        in_query = self._transports.in_query and not self._polls
        url = self._next_url or self._url
        self._actions.append(Connect(url, self._moved, poll=self._polls, in_query=in_query))
        self._next_url = self._move_url = None
        self._socket = _Socket.CONNECTING
        self._socket_token = self._token
        self._connect_at = inf
        self._give_up_at = self._now + self._policy.open_within_s

    # --- a WebSocket beside what polls ---

    def _next_try(self) -> float:
        if self._try_until < inf:
            return self._try_until
        return self._transports.try_at if self._polls and self.ready else inf

    def _try_or_abandon(self) -> None:
        if self._try_until < inf:
            self._actions.append(Abandon())
            self._on_try(TryFailed())
        else:
            self._actions.append(Try(self._url, self._transports.in_query))
            self._try_until = self._now + self._policy.open_within_s
            self._try_token = self._token

    def _on_try(self, event: Upgraded | TryFailed) -> None:
        if self._try_until == inf:
            return  # it was abandoned
        self._try_until = inf
        if isinstance(event, TryFailed):
            self._transports.try_failed(self._now, self._random, opened=event.opened)
            return
        self._transports.changed_over()
        self._polls = False
        self._connect_at = self._pong_by = inf
        self._socket_token = self._try_token
        self._on_frame(parse_frame(event.text))

    # --- the token ---

    def _on_token(self, event: Token | TokenFailed) -> None:
        self._fetching = False
        if isinstance(event, TokenFailed):
            self._fetch_at = self._now + self._backoff(self._fetch_failures)
            self._fetch_failures += 1
            return
        self._fetch_failures = 0
        self._fetch_at = inf
        self._has_token = True
        self._token += 1
        if self.ready:
            self._authenticate()

    def _authenticate(self) -> None:
        self._actions.append(Authenticate())
        self._socket_token = self._token

    def _renew_token_before(self, expires_in: object) -> None:
        lifetime_s = number(expires_in)
        if lifetime_s > 0:
            lead_s = min(TOKEN_LEAD_S, lifetime_s / 4)
            self._fetch_at = self._now + max(lifetime_s - lead_s, MIN_TOKEN_REST_S)

    def _on_token_refused(self, token: int) -> None:
        """Get another token: at once, but after a delay if that one was refused as well."""
        if token != self._token or not self._has_token:
            return  # it was known already
        if self._now - self._refused_at >= self._policy.stable_s:
            self._refusals = 0
        delay_s = self._backoff(self._refusals - 1) if self._refusals else 0
        self._refusals += 1
        self._refused_at = self._now
        self._has_token = False
        self._fetch_at = self._now + delay_s

    # --- pulls ---

    def _on_pull(self, event: Pulled | PullFailed) -> None:
        match event:
            case Pulled(cursor=cursor, more=True) if cursor == self.cursor:
                # ``more`` without progress is a fault of the server, and must not cause a busy
                # loop.
                self._pulls.failed(self._now, self._backoff(self._pulls.failures))
            case Pulled(cursor=cursor, more=more, unacked=unacked):
                self._pulls.succeeded(cursor)
                if more:
                    self._pulls.want(self._now)
                self._acked = min(self._acked, cursor)  # the mailbox may have been started anew
                if unacked and self.acks_by_socket and cursor > self._acked:
                    self._ack_at = max(self._now, self._acked_at + self._policy.ack_every_s)
            case PullFailed(cursor=cursor, retry_after_s=retry_after_s, unauthorized=unauthorized):
                if cursor is not None:
                    self._pulls.cursor = cursor
                if unauthorized:
                    self._pulls.failed(self._now, 0)
                    self._on_token_refused(self._pull_token)
                else:
                    delay_s = self._backoff(self._pulls.failures)
                    self._pulls.failed(self._now, asked_s(retry_after_s) + delay_s)

    def _poll_soon(self) -> None:
        self._poll_at = self._now + self._policy.poll_after_s * (1 + self._random)

    def _poll_later(self) -> None:
        if self.ready:
            pause_s = self._policy.idle_pull_s * (0.8 + 0.4 * self._random)
        else:
            pause_s = self._policy.poll_every_s * (0.5 + self._random)
        self._poll_at = self._now + pause_s

    def _on_wake(self) -> None:
        self._pulls.retry_now()
        self._transports.wake(self._now)
        if self._connect_at < inf:
            self._connect_at = self._now
        if not self._has_token:
            self._fetch_at = self._now
        if self._ping_at < inf and not self._polls:
            self._ping_at = self._now

    # --- delays ---

    def _backoff(self, failures: int) -> float:
        return self._jitter(failures, self._policy.base_s, self._policy.cap_s)

    def _jitter(self, failures: int, base_s: float, cap_s: float) -> float:
        """Full jitter, after the cap. The exponent is cut where a float would overflow."""
        return self._random * min(cap_s, base_s * 2.0 ** min(failures, 60))
