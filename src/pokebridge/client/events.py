"""What goes into the client's core and what comes out of it: the events and the actions.

They are plain values, with a ``type`` in JSON. The scenarios in ``tests/vectors`` consist of them,
for clients in any language, and an observer gets each of them.
"""

import msgspec

# --- events ---------------------------------------------------------------------------------


class Event(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Something happened. A ``reason`` is for people; the core ignores it."""


class Start(Event, frozen=True, tag="start"):
    """The client was started: the first event, once."""


class Token(Event, frozen=True, tag="token"):
    """A token was fetched; connections, pulls and ``authenticate`` use it from now on."""


class TokenFailed(Event, frozen=True, tag="token_failed"):
    """No token could be fetched."""

    reason: str = ""


class Opened(Event, frozen=True, tag="opened"):
    """The handshake is done; ``ready`` is still to come."""


class Text(Event, frozen=True, tag="text"):
    """The socket brought a text message."""

    text: str


class Closed(Event, frozen=True, tag="closed"):
    """The socket closed, or none could be opened: then ``code`` is 1006."""

    code: int
    reason: str = ""


class Refused(Event, frozen=True, tag="refused"):
    """The handshake was answered with an HTTP status other than 101."""

    status: int
    retry_after_s: float | None = None
    reason: str = ""


class Pulled(Event, frozen=True, tag="pulled"):
    """The pull succeeded: everything up to ``cursor`` is handled. ``more``: more is waiting.

    ``unacked``: ``cursor`` is still to be acked, over the socket.
    """

    cursor: int
    more: bool = False
    unacked: bool = False


class PullFailed(Event, frozen=True, tag="pull_failed"):
    """The pull failed, or the handling of its page did.

    ``unauthorized``: its token was refused. ``cursor``: how far it got nonetheless.
    """

    unauthorized: bool = False
    retry_after_s: float | None = None
    cursor: int | None = None
    reason: str = ""


class Upgraded(Event, frozen=True, tag="upgraded"):
    """The WebSocket that :class:`Try` opened has brought its first frame, ``text``: ``ready``.

    It is the client's socket from now on, and polling ends.
    """

    text: str


class TryFailed(Event, frozen=True, tag="try_failed"):
    """The WebSocket that :class:`Try` opens has failed; ``opened``: after its handshake."""

    opened: bool = False
    reason: str = ""


class Wake(Event, frozen=True, tag="wake"):
    """The network came back or the machine woke up: whatever waits for a delay is retried now."""


class Tick(Event, frozen=True, tag="tick"):
    """The time is ``timer``, or later."""


AnyEvent = (
    Start
    | Token
    | TokenFailed
    | Opened
    | Text
    | Closed
    | Refused
    | Pulled
    | PullFailed
    | Upgraded
    | TryFailed
    | Wake
    | Tick
)

# --- actions --------------------------------------------------------------------------------


class Action(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Something is to be done, now."""


class FetchToken(Action, frozen=True, tag="fetch_token"):
    """Get a new token; answer with :class:`Token` or :class:`TokenFailed`."""


class Connect(Action, frozen=True, tag="connect"):
    """Open the socket; answer with :class:`Opened`, or :class:`Refused` or :class:`Closed`.

    ``poll``: the frames are to be polled over HTTP, as if they came through a socket. ``in_query``:
    the token goes into the query, because something between refuses it elsewhere.
    """

    url: str
    moved: bool = False
    poll: bool = False
    in_query: bool = False


class Try(Action, frozen=True, tag="try"):
    """Open a WebSocket while polling; answer with :class:`Upgraded` or :class:`TryFailed`."""

    url: str
    in_query: bool = False


class Abandon(Action, frozen=True, tag="abandon"):
    """Drop the WebSocket that is being tried; no event of it may follow."""


class Disconnect(Action, frozen=True, tag="disconnect"):
    """Drop the socket, whatever its state; no event of it may follow."""


class Ping(Action, frozen=True, tag="ping"):
    """Send a ``ping`` message."""


class Authenticate(Action, frozen=True, tag="authenticate"):
    """Send the token in an ``auth`` message."""


class Ack(Action, frozen=True, tag="ack"):
    """Send an ``ack`` message: this device has everything up to ``version``."""

    version: int


class Pull(Action, frozen=True, tag="pull"):
    """Pull what is newer than ``after``; answer with :class:`Pulled` or :class:`PullFailed`."""

    after: int


class Stop(Action, frozen=True, tag="stop"):
    """The server has stopped this client for good; nothing else will follow."""

    code: int


AnyAction = (
    FetchToken | Connect | Try | Abandon | Disconnect | Ping | Authenticate | Ack | Pull | Stop
)
