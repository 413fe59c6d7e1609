"""The limit on the size of a request body, by path."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from pokebridge.api.problems import problem
from pokebridge.errors import TooLargeError


class BodyLimit:
    """ASGI middleware that answers 413 to a body above the cap of its path.

    A declared length (``Content-Length``) above the cap is refused before anything is read. A body
    without one is counted as it streams, and the read that crosses the cap raises. So at most the
    cap and one chunk are held in memory.
    """

    def __init__(
        self, app: ASGIApp, *, default_bytes: int, bytes_by_path: Mapping[str, int]
    ) -> None:
        self._app = app
        self._default_bytes = default_bytes
        self._bytes_by_path = bytes_by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or refuse its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit_bytes = self._bytes_by_path.get(scope["path"], self._default_bytes)
        declared = Headers(scope=scope).get("content-length")
        if declared is not None and declared.isdecimal() and int(declared) > limit_bytes:
            refusal = problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _detail(limit_bytes))
            await refusal(scope, receive, send)
            return
        await self._app(scope, _Counted(receive, limit_bytes), send)


class _Counted:
    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes

    async def __call__(self) -> AsgiMessage:
        message = await self._receive()
        self._left_bytes -= len(message.get("body", b""))
        if self._left_bytes < 0:
            raise TooLargeError(_detail(self._limit_bytes))
        return message


def _detail(limit_bytes: int) -> str:
    return f"a body may have at most {limit_bytes} bytes here"
