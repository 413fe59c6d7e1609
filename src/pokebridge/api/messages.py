"""The calls about messages: send, pull, acknowledge."""

import hashlib
import random
import re
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from http import HTTPStatus

import msgspec
import structlog
from msgspec import UNSET, Raw

from pokebridge.api import schema
from pokebridge.api.exchange import (
    NEVER_CACHED,
    Request,
    Response,
    Route,
    body_reader,
    json_response,
    no_content,
    read_query,
)
from pokebridge.api.openapi import Call
from pokebridge.api.waiting import Waiting
from pokebridge.mailbox.base import Inbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.model import (
    DEFAULT_DEVICE,
    Message,
    Page,
    SendMessage,
    check_device,
)
from pokebridge.submission import SendRequest, new_message

# The end of the year 9999, the last that clients can read.
_LATEST_MS = 253_402_300_799_999

log = structlog.get_logger(__name__)

_TAG = re.compile(r'(?:W/)?"(0|[1-9]\d{0,15})-([0-9a-f]{32})"')


class MessageCalls:
    """The handlers of ``/v1/messages``.

    ``on_pulled`` is called with a recipient and the version up to which it has everything now.
    """

    def __init__(
        self,
        inbox: Inbox,
        devices: KnownDevices,
        send: SendMessage,
        on_pulled: Callable[[str, int], None],
        waiting: Waiting | None = None,
    ) -> None:
        self._inbox = inbox
        self._devices = devices
        self._send = send
        self._on_pulled = on_pulled
        self._waiting = waiting
        self._read_message = body_reader(SendRequest)
        self._read_ack = body_reader(schema.AckRequest)

    async def send(self, request: Request) -> Response:
        """POST /v1/messages."""
        wanted = await self._read_message(request)
        sender = request.caller.subject
        # An id is no secret. One from the operating system would cost a system call.
        default_id = f"{random.getrandbits(128):032x}"
        receipt = await self._send(new_message(wanted, sender, default_id))
        status = HTTPStatus.OK if receipt.duplicate else HTTPStatus.ACCEPTED
        return json_response(schema.Sent(receipt.id, receipt.version), status)

    async def pull(self, request: Request) -> Response:
        """GET /v1/messages: one read of the mailbox, whatever the answer, if it does not wait."""
        reader = request.caller.subject
        query = read_query(request, schema.PullQuery)
        if query.device is not UNSET:
            await self._devices.see(reader, check_device(query.device))
        own, if_none_match = _readers_own(reader), request.header(b"if-none-match")
        read = partial(self._read, reader, query, _known_head(if_none_match, own))
        if query.wait_s and self._waiting is not None:

            def is_news(page: Page) -> bool:
                return page.version != query.after and not _matches(if_none_match, _etag(page, own))

            page = await self._waiting.read(request, query.wait_s, read, is_news)
        else:
            page = await read()
        etag = _etag(page, own)
        headers = [(b"etag", etag.encode()), (b"vary", b"Authorization")]
        if request.is_waiting and self._waiting is not None and self._waiting.ends_soon:
            headers.append((b"connection", b"close"))
        if _matches(if_none_match, etag):
            return Response(HTTPStatus.NOT_MODIFIED, [*headers, NEVER_CACHED])
        messages = [_pulled(message) for message in page.messages]
        return json_response(schema.Pulled(messages, page.version, page.more), headers=headers)

    async def _read(self, reader: str, query: schema.PullQuery, known_head: int | None) -> Page:
        page = await self._inbox.read(
            reader, after=query.after, limit=query.limit, unless_head=known_head
        )
        self._on_pulled(reader, page.version if page.more else page.head)
        return page

    async def ack(self, request: Request) -> Response:
        """POST /v1/messages/ack."""
        reader = request.caller.subject
        query = read_query(request, schema.AckQuery)
        acked = await self._read_ack(request)
        given = (acked.device, query.device)
        devices = [check_device(device) for device in given if device is not UNSET]
        await self._inbox.ack(reader, [*devices, DEFAULT_DEVICE][0], acked.version)
        self._on_pulled(reader, acked.version)
        return no_content()

    def routes(self) -> Iterable[Route]:
        """These calls."""
        yield Call(
            "POST",
            "/v1/messages",
            self.send,
            "Send a message",
            scope="send",
            body=SendRequest,
            answers={202: schema.Sent, 200: schema.Sent},
            problems=[507],
        )
        yield Call(
            "GET",
            "/v1/messages",
            self.pull,
            "Pull the caller's messages",
            query=schema.PullQuery,
            has_etag=True,
            answers={200: schema.Pulled, 304: "Nothing new: `If-None-Match` has the `ETag`."},
            problems=[409, 429],
        )
        yield Call(
            "POST",
            "/v1/messages/ack",
            self.ack,
            "Acknowledge messages",
            query=schema.AckQuery,
            body=schema.AckRequest,
            answers={204: "Acknowledged."},
        )


def _pulled(message: Message) -> schema.PulledMessage:
    seconds, milliseconds = divmod(min(max(message.sent_at_ms, 0), _LATEST_MS), 1000)
    return schema.PulledMessage(
        id=message.id,
        version=message.version,
        sender=message.sender,
        body=Raw(_json(message)),
        sent_at=f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
    )


def _json(message: Message) -> bytes:
    """The body of ``message``, or its text as a string if another program has written invalid JSON.

    Otherwise its reader could not parse the page, and would pull the same page forever.
    """
    try:
        msgspec.json.decode(message.body)
    except (ValueError, RecursionError):
        log.warning("message_body_invalid", sender=message.sender, id=message.id)
        return msgspec.json.encode(message.body.decode(errors="replace"))
    return message.body


@lru_cache(maxsize=4096)
def _readers_own(reader: str) -> str:
    """The part of an entity tag that no other reader's page ever has.

    One URL serves every reader, so a cache on the way, or the browser's own, may validate the page
    of one reader with the token of another. Tags of release 0.1.0 were only the head. They never
    match.
    """
    return hashlib.blake2s(reader.encode(), digest_size=16).hexdigest()


def _etag(page: Page, own: str) -> str:
    return f'"{page.head}-{own}"'


def _known_head(if_none_match: str, own: str) -> int | None:
    """The head that the header names, when it names one in a tag of the reader.

    A mailbox reads no messages for a caller that has its head.
    """
    tag = _TAG.fullmatch(if_none_match.strip())
    return int(tag[1]) if tag and tag[2] == own else None


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the header names ``etag``, compared weakly (RFC 9110, section 13.1.2)."""
    if not if_none_match:
        return False
    if if_none_match == etag:  # as usual
        return True
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]
