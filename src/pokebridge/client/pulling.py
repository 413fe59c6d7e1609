"""A pull: a page of the mailbox over HTTP (docs/protocol.md, section 4), or the user's own call."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from http import HTTPStatus
from ssl import SSLContext
from typing import Any, Protocol

import httpx
import msgspec

from pokebridge.client.events import Pulled, PullFailed
from pokebridge.errors import AnswerTooLongError
from pokebridge.outgoing import Answer, http_client, read_answer

# An answer may take as long as it needs, but each KiB of it must come within this time.
PROGRESS_WITHIN_S = 10.0
PROGRESS_BYTES = 1024
# The longest that a whole answer may take, and its largest size. The bodies of a page have 1 MiB.
ANSWER_WITHIN_S = 120.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024
# Servers close an idle connection after 5 s. A pull must not be sent into a closed one.
KEEPALIVE_S = 3.0
PAGE_LIMIT = 50
# After an answer that was cut off, the next page is this much smaller.
SMALLER_PAGE = 4

_log = logging.getLogger("pokebridge.client")


class ReceivedMessage(msgspec.Struct, frozen=True):
    """A message from the mailbox. ``body`` is whatever JSON value its sender gave it."""

    version: int
    id: str
    sender: str
    body: Any
    sent_at: datetime


OnMessages = Callable[[Sequence[ReceivedMessage]], Awaitable[None]]
"""Handles messages, in order. They are acked when it returns; when it raises they come again."""

OnPoke = Callable[[int], Awaitable[int | None]]
"""Pulls what is newer than the cursor. Returns the new cursor, or nothing if the data has none."""


class Puller(Protocol):
    """Makes the core's pulls."""

    async def pull(self, after: int, token: str) -> Pulled | PullFailed:
        """Handle all that is newer than ``after``, or a part of it. Never raises."""

    async def close(self) -> None:
        """Release what it holds."""


class OwnPuller:
    """Calls the user's own pull function."""

    def __init__(self, on_poke: OnPoke) -> None:
        self._on_poke = on_poke

    async def pull(self, after: int, token: str) -> Pulled | PullFailed:  # noqa: ARG002 - it has its own
        """Call the function."""
        try:
            cursor = await self._on_poke(after)
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            _log.exception("on_poke failed and will be called again")
            return PullFailed(reason=repr(error))
        return Pulled(after if cursor is None else cursor)

    async def close(self) -> None:
        """Nothing is held."""


class _Page(msgspec.Struct, frozen=True):
    messages: tuple[ReceivedMessage, ...]
    version: int
    more: bool


class MailboxPuller:
    """Pulls a page, hands it over and acks it, in this order, so that no message is lost.

    A page whose handler raises is not acked and comes again. When only the ack fails, only the ack
    is repeated. While ``leaves_acks`` is true the core acks over the socket instead.
    """

    def __init__(
        self,
        url: str,
        on_messages: OnMessages,
        *,
        device: str,
        cursor: int,
        tls: SSLContext | None,
        leaves_acks: Callable[[], bool] = lambda: False,
    ) -> None:
        self._on_messages = on_messages
        self._leaves_acks = leaves_acks
        self._device = device
        self._acked = cursor
        self._limit = PAGE_LIMIT
        # The mailbox's head as of the last page that left nothing to pull: cursor and ETag.
        self._etag: tuple[int, str] | None = None
        self._http = http_client(
            url,
            tls=tls,
            base_url=url,
            timeout=None,  # _request has a deadline of its own
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S),
        )

    async def pull(self, after: int, token: str) -> Pulled | PullFailed:
        """Handle the messages above ``after``, or the first page of them."""
        try:
            page = await self._read(after, token)
        except _RequestError as error:
            return error.as_event()
        if page.version < after:
            _log.warning("the mailbox was started anew: its head is below the cursor %d", after)
            self._acked = 0
            return Pulled(0, more=True)
        try:
            if page.messages:
                await self._on_messages(page.messages)
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            _log.exception("on_messages failed; its messages will come again")
            return PullFailed(reason=repr(error))
        if self._leaves_acks():
            return Pulled(page.version, page.more, unacked=True)
        try:
            if page.version > self._acked:
                await self._ack(page.version, token)
        except _RequestError as error:
            return error.as_event(page.version)
        return Pulled(page.version, page.more)

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def _read(self, after: int, token: str) -> _Page:
        """The page above ``after``; an empty one when the server says that nothing has changed."""
        headers = {}
        if self._etag and self._etag[0] == after:
            headers["If-None-Match"] = self._etag[1]
        query = {"after": str(after), "limit": str(self._limit)}
        expected = {HTTPStatus.OK, HTTPStatus.NOT_MODIFIED} if headers else {HTTPStatus.OK}
        try:
            response, body = await self._request(
                "GET", "/v1/messages", query, token, expected, headers=headers
            )
        except _IncompleteError:
            self._limit = max(self._limit // SMALLER_PAGE, 1)
            raise
        self._limit = min(self._limit * 2, PAGE_LIMIT)
        if response.status_code == HTTPStatus.NOT_MODIFIED:
            return _Page((), after, more=False)
        try:
            page = msgspec.json.decode(body, type=_Page)
        except (ValueError, RecursionError) as error:
            raise _RequestError(
                f"the answer to a pull is not a page of messages: {error}"
            ) from None
        etag = response.headers.get("ETag")
        self._etag = (page.version, etag) if etag and not page.more else None
        return page

    async def _ack(self, version: int, token: str) -> None:
        body = {"version": version}
        await self._request(
            "POST", "/v1/messages/ack", {}, token, {HTTPStatus.NO_CONTENT}, json=body
        )
        self._acked = version

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        token: str,
        expected: Collection[int],
        *,
        headers: dict[str, str] | None = None,
        json: object = None,
    ) -> tuple[httpx.Response, bytes]:
        """The response and its body; its status is one of those ``expected``."""
        request = self._http.build_request(
            method,
            path,
            params=query | {"device": self._device},
            headers={"Authorization": f"Bearer {token}"} | (headers or {}),
            json=json,
        )
        response = None
        try:
            async with asyncio.timeout(PROGRESS_WITHIN_S) as deadline:
                response = await self._http.send(request, stream=True)
                try:
                    answer = await _read(response, deadline)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise _IncompleteError(f"{request.url} stopped sending its answer") from None
        except AnswerTooLongError as error:
            raise _RequestError(str(error)) from None
        except httpx.HTTPError as error:
            if response is not None:
                raise _IncompleteError(f"{request.url} broke off: {error!r}") from error
            raise _RequestError(f"{self._http.base_url} can't be reached: {error!r}") from error
        if answer.status in expected:
            return response, answer.body
        raise _RefusedError(answer)


async def _read(response: httpx.Response, deadline: asyncio.Timeout) -> Answer:
    """The whole answer. Each KiB of it moves ``deadline``: one that drips would never end."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + ANSWER_WITHIN_S
    awaited = PROGRESS_BYTES

    def on_size(size_bytes: int) -> None:
        nonlocal awaited
        if size_bytes >= awaited:
            awaited = size_bytes + PROGRESS_BYTES
            deadline.reschedule(min(loop.time() + PROGRESS_WITHIN_S, ends_at))

    url = str(response.url.copy_with(query=None))
    return await read_answer(url, response, MAX_ANSWER_BYTES, on_size)


class _RequestError(Exception):
    """A request that failed: no answer, or not the expected one."""

    def as_event(self, cursor: int | None = None) -> PullFailed:
        """The same for the core; ``cursor`` if the pull got somewhere nonetheless."""
        return PullFailed(cursor=cursor, reason=str(self))


class _RefusedError(_RequestError):
    """An answer with another status than expected."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.text)
        self._answer = answer

    def as_event(self, cursor: int | None = None) -> PullFailed:
        """The same for the core. Only the bridge's own answer says anything about the token."""
        answer = self._answer
        return PullFailed(
            unauthorized=answer.detail is not None and answer.status == HTTPStatus.UNAUTHORIZED,
            retry_after_s=answer.retry_after_s,
            cursor=cursor,
            reason=str(self),
        )


class _IncompleteError(_RequestError):
    """An answer that stalled or broke off."""
