"""How a backend without a transport sends messages and pokes: over an instance's HTTP API."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from http import HTTPStatus
from time import monotonic
from typing import Any, TypeVar

import httpx
import msgspec

from pokebridge.backoff import backoff_s
from pokebridge.errors import (
    AnswerTooLongError,
    AuthError,
    ForbiddenError,
    InputError,
    MailboxFullError,
    TransportError,
)
from pokebridge.model import Poke, Receipt, check_recipient
from pokebridge.outgoing import Answer, check_token, http_client, read_answer
from pokebridge.poke_merger import LINGER_S, MAX_PENDING_RECIPIENTS, PokeCalls
from pokebridge.urls import check_bridge_url

# The limit of one POST /v1/pokes (docs/protocol.md, section 4).
MAX_RECIPIENTS_PER_REQUEST = 1000
# For a whole call. A large one may take longer, as it would on a slow line.
HTTP_TIMEOUT_S = 10.0
SLOW_LINE_BYTES_PER_S = 16_000
# The answer is a number or two, or one problem.
MAX_ANSWER_BYTES = 64 * 1024
FIRST_RETRY_S = 0.2
LAST_RETRY_S = 5.0

T = TypeVar("T")
_Content = TypeVar("_Content", bound=msgspec.Struct)


class _Accepted(msgspec.Struct):
    accepted: int


class _Sent(msgspec.Struct):
    id: str
    version: int


class HttpPublisher(PokeCalls):
    """Sends messages and pokes through an instance's HTTP API.

    A poke carries no version here, so clients pull on every poke. All calls also raise
    :class:`~pokebridge.errors.AuthError` when the token is refused and
    :class:`~pokebridge.errors.ForbiddenError` when it lacks the scope.

    Args:
        url: the instance's HTTP address, ``https://bridge.example.org``.
        token: a JWT with the scope ``poke`` to poke and ``send`` to send, or a coroutine function
            that returns a fresh one. The function is called before every request.
        linger_s: how long a poke waits for others at most, while earlier pokes are being sent.
        max_pending: recipients that may be pending; at this limit callers wait.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], Awaitable[str]],
        *,
        linger_s: float = LINGER_S,
        max_pending: int = MAX_PENDING_RECIPIENTS,
    ) -> None:
        super().__init__(self._send_pokes, linger_s, max_pending)
        self._url = check_bridge_url("the publisher's url", url)
        self._token = token
        self._http = http_client(self._url, timeout=None)  # _post has a deadline

    async def send(
        self,
        recipient: str,
        body: Any,
        *,
        message_id: str | None = None,
        ttl_s: float | None = None,
        is_ephemeral: bool = False,
        timeout_s: float = 30.0,
    ) -> Receipt:
        """Put a message into the mailbox of ``recipient`` and poke its clients.

        A send that fails is repeated, with growing pauses, for ``timeout_s``. Each attempt has the
        same id, so the message is committed once. Give a ``message_id`` of your own, and repeat a
        send yourself, also after a crash: the receipt then says ``duplicate``.

        Args:
            recipient: who gets it.
            body: what msgspec encodes as JSON, up to 64 KiB.
            message_id: the same id from the same sender commits nothing again. Default: random.
            ttl_s: seconds after which it may be deleted unread. Default: never.
            is_ephemeral: only for clients that are connected now; deleted after 30 s at most.
            timeout_s: how long failures are repeated; 0 makes one attempt.

        Raises:
            InputError: the message is invalid.
            MailboxFullError: the recipient's mailbox has no room.
            TransportError: no instance accepted it in time. It may have been committed all the
                same, so repeat it with the same ``message_id``.
        """
        message: dict[str, Any] = {"recipient": check_recipient(recipient), "body": body}
        message["id"] = message_id or uuid.uuid4().hex
        if ttl_s is not None:
            message["ttl_s"] = ttl_s
        if is_ephemeral:
            message["ephemeral"] = True
        try:
            content = msgspec.json.encode(message)
        except (TypeError, ValueError) as error:
            raise InputError(f"body: can't be encoded as JSON: {error}") from None
        return await self._send_until(monotonic() + timeout_s, content)

    async def close(self) -> None:
        """Send the gathered pokes, wait until they are accepted, and close the connections.

        It takes 15 s at most.
        """
        await super().close()
        await self._http.aclose()

    async def _send_until(self, deadline_s: float, content: bytes) -> Receipt:
        failures = 0
        while True:
            try:
                status, sent = await self._post("/v1/messages", content, _Sent)
            except TransportError:
                pause_s = backoff_s(failures, first_s=FIRST_RETRY_S, cap_s=LAST_RETRY_S)
                if monotonic() + pause_s >= deadline_s:
                    raise
                failures += 1
                await asyncio.sleep(pause_s)
            else:
                return Receipt(sent.id, sent.version, duplicate=status == HTTPStatus.OK)

    async def _send_pokes(self, pokes: Sequence[Poke]) -> None:
        recipients = [poke.recipient for poke in pokes]
        for some in chunks(recipients, MAX_RECIPIENTS_PER_REQUEST):
            content = msgspec.json.encode({"recipients": some})
            await self._post("/v1/pokes", content, _Accepted)

    async def _post(self, path: str, content: bytes, kind: type[_Content]) -> tuple[int, _Content]:
        """The status of the answer, and its content. Raises when nothing was accepted."""
        timeout_s = HTTP_TIMEOUT_S + len(content) / SLOW_LINE_BYTES_PER_S
        url = self._url + path
        try:
            # httpx limits each step only, so an answer that drips would never end.
            async with asyncio.timeout(timeout_s):
                answer = await self._call(url, content)
        except TimeoutError:
            raise TransportError(f"{url} did not answer within {timeout_s:.0f} s") from None
        except httpx.HTTPError as error:
            raise TransportError(f"{url} can't be reached: {error!r}") from error
        return answer.status, _accepted(answer, kind)

    async def _call(self, url: str, content: bytes) -> Answer:
        token = self._token if isinstance(self._token, str) else await self._token()
        headers = {
            "Authorization": f"Bearer {check_token(token)}",
            "Content-Type": "application/json",
        }
        try:
            async with self._http.stream("POST", url, content=content, headers=headers) as response:
                return await read_answer(str(response.url), response, MAX_ANSWER_BYTES)
        except AnswerTooLongError as error:
            raise TransportError(str(error)) from None


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut ``items`` into pieces of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _accepted(answer: Answer, kind: type[_Content]) -> _Content:
    """What the instance answered. Raises unless it has accepted the request.

    If somebody else answered, a retry may succeed.
    """
    status, said = answer.status, answer.text
    if status in {HTTPStatus.OK, HTTPStatus.ACCEPTED}:
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (ValueError, RecursionError):
            pass
    if answer.detail is None:
        raise TransportError(said)
    if status == HTTPStatus.UNAUTHORIZED:
        raise AuthError(said)
    if status == HTTPStatus.FORBIDDEN:
        raise ForbiddenError(said)
    if status == HTTPStatus.INSUFFICIENT_STORAGE:
        raise MailboxFullError(said)
    if 400 <= status < 500 and status != HTTPStatus.TOO_MANY_REQUESTS:
        raise InputError(said)
    raise TransportError(said)
