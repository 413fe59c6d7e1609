"""The calls about messages."""

import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, Raw
from starlette.exceptions import HTTPException

from pokebridge.api import schema
from pokebridge.api.exchange import (
    Verify,
    authorize,
    body_reader,
    decode_json,
    json_response,
    read_query,
)
from pokebridge.api.openapi import Api
from pokebridge.errors import InputError
from pokebridge.mailbox.base import Mailbox
from pokebridge.mailbox.devices import KnownDevices
from pokebridge.model import (
    DEFAULT_DEVICE,
    Message,
    NewMessage,
    Receipt,
    check_device,
    check_recipient,
    is_recipient,
)

# A body nested deeper could exhaust the stack of the parser that pulls it, for ever.
MAX_BODY_DEPTH = 100
_decode_ingress = msgspec.json.Decoder(schema.IngressMessage).decode
_HEAD_TAG = re.compile(r'(?:W/)?"(0|[1-9]\d{0,15})"')


class MessageCalls:
    """Send, pull, acknowledge."""

    def __init__(
        self,
        verify: Verify,
        mailbox: Mailbox,
        send: Callable[[NewMessage], Awaitable[Receipt]],
        on_pulled: Callable[[str, int], None],
        devices: KnownDevices | None = None,
    ) -> None:
        """``on_pulled`` is told that a recipient has what there is up to a version."""
        self._verify = verify
        self._mailbox = mailbox
        self._send = send
        self._on_pulled = on_pulled
        self._devices = devices or KnownDevices(mailbox)
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
            await self._devices.see(reader, check_device(query.device))
        if_none_match = request.headers.get("if-none-match", "")
        page = await self._mailbox.read(
            reader, after=query.after, limit=query.limit, unless_head=_known_head(if_none_match)
        )
        self._on_pulled(reader, page.version if page.more else page.head)
        headers = {"ETag": f'"{page.head}"', "Cache-Control": "private, no-cache"}
        if _matches(if_none_match, headers["ETag"]):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
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
        self._on_pulled(reader, acked.version)
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
            problems=[507],
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


def read_ingress(body: bytes, default_id: str) -> NewMessage:
    """The message in what a queue delivered, named ``default_id`` unless it has an ``id``.

    So a redelivery is the same message. Raises :class:`~pokebridge.errors.InputError`, as for a
    POST of the same body.
    """
    try:
        wanted = decode_json(_decode_ingress, body)
        message = _new_message(check_recipient(wanted.sender), wanted)
    except HTTPException as error:
        raise InputError(error.detail) from None
    if message.has_idempotency_key:
        return message
    return replace(message, id=default_id, has_idempotency_key=True)


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
        ttl_s=_ttl_s(wanted),
        has_idempotency_key=wanted.id is not UNSET,
        is_ephemeral=wanted.ephemeral,
    )


def _ttl_s(wanted: schema.SendRequest) -> float | None:
    ttl_s = None if wanted.ttl_s is UNSET else wanted.ttl_s
    if wanted.ephemeral:
        return min(ttl_s or schema.EPHEMERAL_TTL_S, schema.EPHEMERAL_TTL_S)
    return ttl_s


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


def _pulled(message: Message) -> schema.PulledMessage:
    seconds, milliseconds = divmod(message.sent_at_ms, 1000)
    return schema.PulledMessage(
        id=message.id,
        version=message.version,
        sender=message.sender,
        body=Raw(message.body),
        sent_at=f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
    )


def _known_head(if_none_match: str) -> int | None:
    """The one head that the header names, so that a reader who has it has nothing read for it."""
    tag = _HEAD_TAG.fullmatch(if_none_match.strip())
    return int(tag[1]) if tag else None


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the header names ``etag``, compared weakly (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]
