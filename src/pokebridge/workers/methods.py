"""The methods that a worker may call on its hub, and their types."""

from collections.abc import Sequence
from typing import Final

import msgspec

from pokebridge.model import NewMessage, Page, Poke, Receipt
from pokebridge.workers.calls import Method

READ: Final = Method[[str, int, int, int, int | None], Page](
    "read", tuple[str, int, int, int, int | None], Page
)
SEE_DEVICE: Final = Method[[str, str], None]("see_device", tuple[str, str], None)
ACK: Final = Method[[str, str, int], None]("ack", tuple[str, str, int], None)

SEND: Final = Method[[NewMessage], Receipt]("send", tuple[NewMessage], Receipt)
"""Commit a message and poke its recipient: the processor's ``send``."""
PUBLISH: Final = Method[[Sequence[Poke]], None]("publish", tuple[list[Poke]], None)
"""Publish pokes, merged with those of others: the publisher's ``publish``."""
PUBLISH_NOW: Final = Method[[Sequence[Poke]], None]("publish_now", tuple[list[Poke]], None)
"""Publish pokes at once: the publisher's ``publish_now``."""


class HttpRequest(msgspec.Struct, array_like=True):
    """An HTTP request, as its ASGI scope describes it, with a ``number`` of the worker's.

    Without ``has_body`` its body is empty. Otherwise the hub says when it wants that.
    """

    number: int
    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    scheme: str
    http_version: str
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int] | None
    has_body: bool


class HttpResponse(msgspec.Struct, array_like=True):
    """A whole HTTP response."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


HTTP: Final = Method[[HttpRequest], HttpResponse](
    "http", tuple[HttpRequest], HttpResponse, may_wait=True
)
"""Answer an HTTP request that concerns the whole instance. Each has a connection of its own."""
