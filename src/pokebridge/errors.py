"""Every error that pokebridge raises on purpose, in one tree.

    PokebridgeError
    ├── ConfigError                 a setting is wrong: the start stops with one line that names it
    │   └── MissingExtraError       a part was chosen whose library is not installed
    ├── RefusedError                a WebSocket handshake is refused: limit, Origin or form
    ├── InputError                  the input does not follow the contract
    │   ├── NotJsonError            a body is not JSON
    │   ├── TooLargeError           a body exceeds its size limit
    │   ├── SignalError             a signal does not follow protocol.md section 2
    │   └── FrameError              a WebSocket peer broke RFC 6455 or protocol.md section 3
    ├── AuthError                   no valid token
    │   ├── ForbiddenError          a valid token that does not allow this
    │   └── KeysUnavailableError    the keys that would verify the token are unavailable now
    ├── NotFoundError               nothing has the name that was given
    ├── ConflictError               the present state does not allow what was asked
    ├── MailboxFullError            a recipient's quota is used up: the message is not stored
    └── UnavailableError            a part that we depend on does not answer: try again
        ├── TransportError
        │   ├── SignalRefusedError  the engine works, and refuses one signal
        │   └── NotPublishedError   some pokes were not accepted, and the others were
        ├── AnswerTooLongError      the answer of another server exceeds its size limit
        ├── MailboxError
        │   └── MailboxRefusedError the store works, and refuses one call
        └── CoordinationError

Each class has the HTTP status and the WebSocket close code of its answer, so that no caller needs a
table. Messages are for people, say what to change, and never contain a secret.
"""

import sys
from http import HTTPStatus

__all__ = [
    "AnswerTooLongError",
    "AuthError",
    "ConfigError",
    "ConflictError",
    "CoordinationError",
    "ForbiddenError",
    "FrameError",
    "InputError",
    "KeysUnavailableError",
    "MailboxError",
    "MailboxFullError",
    "MailboxRefusedError",
    "MissingExtraError",
    "NotFoundError",
    "NotJsonError",
    "NotPublishedError",
    "PokebridgeError",
    "RefusedError",
    "SignalError",
    "SignalRefusedError",
    "TooLargeError",
    "TransportError",
    "UnavailableError",
]


class PokebridgeError(Exception):
    """The base class of every error that pokebridge raises on purpose."""

    status: HTTPStatus = HTTPStatus.INTERNAL_SERVER_ERROR
    close_code: int = 1011


class ConfigError(PokebridgeError):
    """A setting is wrong. The message names the setting and the values that it may have."""


class MissingExtraError(ConfigError):
    """The library of ``what`` is not installed. The extra ``extra`` installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a library that is not installed:"
            f" {sys.executable or 'python'} -m pip install 'pokebridge[{extra}]'"
        )


class RefusedError(PokebridgeError):
    """A WebSocket handshake is refused with ``status`` and ``headers``."""

    def __init__(
        self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}


class InputError(PokebridgeError):
    """The input breaks the contract. It has changed nothing."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    close_code = 1008


class NotJsonError(InputError):
    """A body is not JSON."""

    status = HTTPStatus.BAD_REQUEST


class TooLargeError(InputError):
    """A body exceeds its size limit. The message names the limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    close_code = 1009


class SignalError(InputError):
    """The body of a signal does not follow protocol.md section 2."""


class FrameError(InputError):
    """A WebSocket peer broke the framing or the frame rules.

    ``close_code`` is the instance's own: 1002 framing, 1003 binary, 1007 not UTF-8, 1008 not one
    of our messages, 1009 too big.
    """

    def __init__(self, close_code: int, reason: str) -> None:
        super().__init__(reason)
        self.close_code = close_code


class AuthError(PokebridgeError):
    """The token is missing, invalid or expired."""

    status = HTTPStatus.UNAUTHORIZED
    close_code = 4401


class ForbiddenError(AuthError):
    """The token is valid, but does not permit the request."""

    status = HTTPStatus.FORBIDDEN
    close_code = 4403


class KeysUnavailableError(AuthError):
    """The keys that would verify the token are unavailable now. A retry may succeed."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    close_code = 1013


class NotFoundError(PokebridgeError):
    """Nothing has the name that was given."""

    status = HTTPStatus.NOT_FOUND


class ConflictError(PokebridgeError):
    """The present state does not allow the request. The message says why."""

    status = HTTPStatus.CONFLICT


class MailboxFullError(PokebridgeError):
    """The recipient's mailbox has no room for the message, which was not committed.

    The status is 507 (RFC 4918, section 11.5). With 429 or 503 HTTP libraries would retry by
    themselves, but no pause of the sender makes room.
    """

    status = HTTPStatus.INSUFFICIENT_STORAGE
    close_code = 1013


class UnavailableError(PokebridgeError):
    """A part that the caller depends on does not answer. A retry may succeed."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    close_code = 1013


class AnswerTooLongError(UnavailableError):
    """The answer of another server exceeds its size limit. The message names both."""


class TransportError(UnavailableError):
    """The transport cannot publish or subscribe now."""


class SignalRefusedError(TransportError):
    """The engine works, and refuses a signal. It may accept the others of the same publish.

    ``is_too_large``: it is refused for its size, so it can never be published. Otherwise the reason
    may be, for example, a missing permission.
    """

    def __init__(self, message: str, *, is_too_large: bool = False) -> None:
        super().__init__(message)
        self.is_too_large = is_too_large


class NotPublishedError(TransportError):
    """Some pokes were not accepted: those for ``recipients``. All others were.

    The pokes for those in ``too_large`` exceed the limit even as single signals.
    """

    def __init__(
        self, message: str, recipients: frozenset[str], too_large: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(message)
        self.recipients = recipients
        self.too_large = too_large


class MailboxError(UnavailableError):
    """The mailbox cannot be read or written now.

    If it failed during a write, the write may be committed or not. A message with an idempotency
    key can be sent again, and is committed once.
    """


class MailboxRefusedError(MailboxError):
    """The store works, but refuses a call, perhaps for its data. It may accept others."""


class CoordinationError(UnavailableError):
    """The coordination store is unavailable now. The last shard map stays in force."""
