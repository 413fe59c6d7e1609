"""The calls about messages."""

import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from http import HTTPStatus
from itertools import accumulate

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, Raw
from starlette.exceptions import HTTPException

from pokebridge.errors import InputError
from pokebridge.mailbox.base import Mailbox
from pokebridge.model import (
    DEFAULT_DEVICE,
    Message,
    NewMessage,
    Receipt,
    check_device,
    check_recipient,
    is_recipient,
)
from pokebridge.server import schema
from pokebridge.server.exchange import (
    Verify,
    authorize,
    body_reader,
    decode_json,
    json_response,
    read_query,
)
from pokebridge.server.openapi import Api

# A body nested deeper could exhaust the stack of the parser that pulls it, for ever.
MAX_BODY_DEPTH = 100
SEEN_DEVICES = 10_000
# The bodies of one page: a pull of 500 large messages is several answers, not one of 32 MiB.
PAGE_CAP_BYTES = 1024 * 1024


class MessageCalls:
    """Send, pull, acknowledge."""

    def __init__(
        self,
        verify: Verify,
        mailbox: Mailbox,
        send: Callable[[NewMessage], Awaitable[Receipt]],
    ) -> None:
        self._verify = verify
        self._mailbox = mailbox
        self._send = send
        self._seen = _SeenDevices(mailbox)
        self._read_message = body_reader(schema.SendRequest)
        self._read_ack = body_reader(schema.AckRequest)

    async def send(self, request: Request) -> Response:
        """POST /v1/messages."""
        claims = await authorize(self._verify, request, "send")
        wanted = await self._read_message(request)
        receipt = await self._send(_new_message(claims.subject, wanted))
        status = HTTPStatus.OK if receipt.duplicate else HTTPStatus.ACCEPTED
        return json_response(schema.Sent(receipt.id, receipt.version), status)

    async def pull(self, request: Request) -> Response:
        """GET /v1/messages: one read of the mailbox, whatever the answer."""
        reader = (await authorize(self._verify, request)).subject
        query = read_query(request, schema.PullQuery)
        if query.device is not UNSET:
            await self._seen.add(reader, check_device(query.device))
        page = await self._mailbox.read(reader, after=query.after, limit=query.limit)
        headers = {"ETag": f'"{page.head}"', "Cache-Control": "private, no-cache"}
        if _matches(request.headers.get("if-none-match", ""), headers["ETag"]):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        shown = _fitting(page.messages)
        if len(shown) < len(page.messages):
            page = replace(page, messages=shown, version=shown[-1].version, more=True)
        messages = [_pulled(message) for message in page.messages]
        return json_response(schema.Pulled(messages, page.version, page.more), headers=headers)

    async def ack(self, request: Request) -> Response:
        """POST /v1/messages/ack."""
        reader = (await authorize(self._verify, request)).subject
        query = read_query(request, schema.AckQuery)
        acked = await self._read_ack(request)
        given = (acked.device, query.device)
        devices = [check_device(device) for device in given if device is not UNSET]
        await self._mailbox.ack(reader, [*devices, DEFAULT_DEVICE][0], acked.version)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    def add_to(self, app: Api) -> None:
        """Have ``app`` answer these calls."""
        app.call(
            "POST",
            "/v1/messages",
            self.send,
            "Send a message",
            scope="send",
            body=schema.SendRequest,
            answers={202: schema.Sent, 200: schema.Sent},
        )
        app.call(
            "GET",
            "/v1/messages",
            self.pull,
            "Pull the caller's messages",
            query=schema.PullQuery,
            has_etag=True,
            answers={200: schema.Pulled, 304: "Nothing new: `If-None-Match` has the `ETag`."},
        )
        app.call(
            "POST",
            "/v1/messages/ack",
            self.ack,
            "Acknowledge messages",
            query=schema.AckQuery,
            body=schema.AckRequest,
            answers={204: "Acknowledged."},
        )


def _new_message(sender: str, wanted: schema.SendRequest) -> NewMessage:
    body = bytes(wanted.body)
    _check_body(body)
    if wanted.id is not UNSET and not (
        is_recipient(wanted.id) and len(wanted.id) <= schema.MAX_ID_LENGTH
    ):
        raise InputError(f"an id is 1 to {schema.MAX_ID_LENGTH} visible ASCII characters")
    return NewMessage(
        recipient=check_recipient(wanted.recipient),
        sender=sender,
        id=uuid.uuid4().hex if wanted.id is UNSET else wanted.id,
        body=body,
        ttl_s=None if wanted.ttl_s is UNSET else wanted.ttl_s,
        id_is_senders=wanted.id is not UNSET,
    )


def _check_body(body: bytes) -> None:
    """Raise unless every client can parse ``body``, as one that can't would be stuck before it."""
    if len(body) > schema.MAX_BODY_BYTES:
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a message's body may have at most {schema.MAX_BODY_BYTES} bytes",
        )
    value = decode_json(msgspec.json.decode, body)
    # Counting brackets is cheap, and enough for almost every body.
    opened = body.count(b"[") + body.count(b"{")
    if opened > MAX_BODY_DEPTH and _is_deeper(value, MAX_BODY_DEPTH):
        raise InputError(f"a message's body may be nested at most {MAX_BODY_DEPTH} deep")


def _is_deeper(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return depth == 0 or any(_is_deeper(child, depth - 1) for child in value)


def _fitting(messages: Sequence[Message]) -> tuple[Message, ...]:
    """As many as fit into an answer, the first one always."""
    sizes_bytes = accumulate(len(message.body) for message in messages)
    fit = sum(size_bytes <= PAGE_CAP_BYTES for size_bytes in sizes_bytes)
    return tuple(messages[: max(fit, 1)])


def _pulled(message: Message) -> schema.PulledMessage:
    seconds, milliseconds = divmod(message.sent_at_ms, 1000)
    return schema.PulledMessage(
        id=message.id,
        version=message.version,
        sender=message.sender,
        body=Raw(message.body),
        sent_at=f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
    )


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the header names ``etag``, compared weakly (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]


class _SeenDevices:
    """Makes devices known to the mailbox, but not again at every pull."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def add(self, recipient: str, device: str) -> None:
        key = (recipient, device)
        if key not in self._recent:
            await self._mailbox.see_device(recipient, device)
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > SEEN_DEVICES:
            self._recent.popitem(last=False)
