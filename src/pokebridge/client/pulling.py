"""What a pull is: a page of one's mailbox over HTTP (protocol.md section 4), or the user's own."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from http import HTTPStatus
from ssl import SSLContext
from typing import Any, Protocol

import httpx
import msgspec

from pokebridge.client.events import Pulled, PullFailed

HTTP_TIMEOUT_S = 10.0
# Shorter than the 5 s after which servers drop an idle connection, lest a pull go into a dead one.
KEEPALIVE_S = 3.0
PAGE_LIMIT = 50

_log = logging.getLogger("pokebridge.client")


class ReceivedMessage(msgspec.Struct, frozen=True):
    """A message from the mailbox. ``body`` is whatever JSON value its sender gave it."""

    version: int
    id: str
    sender: str
    body: Any
    sent_at: datetime


OnMessages = Callable[[Sequence[ReceivedMessage]], Awaitable[None]]
"""Deals with messages, in order; when it returns they are acked."""

OnPoke = Callable[[int], Awaitable[int | None]]
"""Pulls what is newer than the cursor it gets; returns the new cursor, or nothing without any."""


class Puller(Protocol):
    """Makes the core's pulls."""

    async def pull(self, after: int, token: str) -> Pulled | PullFailed:
        """Deal with what is newer than ``after``, or with some of it. Raises nothing."""

    async def close(self) -> None:
        """Give back what it holds."""


class OwnPuller:
    """Leaves it all to a function of the user's."""

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
    """Pulls a page, hands it over and acks it, in this order, so that nothing is lost on the way.

    A page whose handler raises is not acked and comes again; one whose ack fails does not, but its
    ack does.
    """

    def __init__(
        self, url: str, on_messages: OnMessages, *, device: str, cursor: int, tls: SSLContext | None
    ) -> None:
        self._on_messages = on_messages
        self._device = device
        self._acked = cursor
        # What the server said the head was when nothing was left above the cursor.
        self._etag: tuple[int, str] | None = None
        self._http = httpx.AsyncClient(
            base_url=url,
            # Without TLS there is nothing to verify, and the default would load a hundred roots.
            verify=tls or False,
            timeout=HTTP_TIMEOUT_S,
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S),
        )

    async def pull(self, after: int, token: str) -> Pulled | PullFailed:
        """Deal with the messages above ``after``, or with the first page of them."""
        try:
            page = await self._read(after, token)
        except _RequestError as error:
            return error.as_event()
        if page.version < after:
            _log.warning("the mailbox was begun anew: it is behind the cursor %d", after)
            self._acked = 0
            return Pulled(0, more=True)
        try:
            if page.messages:
                await self._on_messages(page.messages)
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything
            _log.exception("messages were not dealt with and will come again")
            return PullFailed(reason=repr(error))
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
        query = {"after": str(after), "limit": str(PAGE_LIMIT)}
        response = await self._request("GET", "/v1/messages", query, token, headers)
        if response.status_code == HTTPStatus.NOT_MODIFIED:
            return _Page((), after, more=False)
        try:
            page = msgspec.json.decode(response.content, type=_Page)
        except (ValueError, RecursionError) as error:
            raise _RequestError(f"what the server sent is no page of messages: {error}") from None
        self._etag = None if page.more else (page.version, response.headers.get("ETag", ""))
        return page

    async def _ack(self, version: int, token: str) -> None:
        await self._request("POST", "/v1/messages/ack", {}, token, json={"version": version})
        self._acked = version

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        token: str,
        headers: dict[str, str] | None = None,
        json: object = None,
    ) -> httpx.Response:
        try:
            response = await self._http.request(
                method,
                path,
                params=query | {"device": self._device},
                headers={"Authorization": f"Bearer {token}"} | (headers or {}),
                json=json,
            )
        except httpx.HTTPError as error:
            raise _RequestError(f"{self._http.base_url} can't be reached: {error!r}") from error
        if response.is_success or response.status_code == HTTPStatus.NOT_MODIFIED:
            return response
        raise _RequestError(f"{path} answered {response.status_code}", response)


class _RequestError(Exception):
    """A request that did not get what it asked for."""

    def __init__(self, reason: str, response: httpx.Response | None = None) -> None:
        super().__init__(reason)
        self._response = response

    def as_event(self, cursor: int | None = None) -> PullFailed:
        """The same for the core; ``cursor`` if the pull got somewhere nonetheless."""
        if self._response is None:
            return PullFailed(cursor=cursor, reason=str(self))
        return PullFailed(
            unauthorized=self._response.status_code == HTTPStatus.UNAUTHORIZED,
            retry_after_s=retry_after_s(self._response.headers.get("Retry-After")),
            cursor=cursor,
            reason=str(self),
        )


def retry_after_s(header: str | None) -> float | None:
    """The header's seconds; ``None`` without any. Its other form, a date, is not heeded."""
    return float(header) if header and header.isdecimal() else None
