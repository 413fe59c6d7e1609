"""The instance's end of an HTTP connection whose calls wait for the frames of a session."""

import asyncio
from typing import Any

import msgspec

from pokebridge.api import schema
from pokebridge.errors import NotFoundError, PokebridgeError, RefusedError
from pokebridge.gateway.entrance import Identity, Verifier
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.polling import PolledSession
from pokebridge.wire import Listen


class WaitingCalls(asyncio.Protocol):
    """``GET /v1/pokes``, without HTTP: a line of JSON for each call, and one for each answer."""

    def __init__(self, gateway: Gateway, verifier: Verifier, transport: asyncio.Transport) -> None:
        self._gateway = gateway
        self._verifier = verifier
        self._transport = transport
        self._unparsed = b""
        self._called: PolledSession | None = None

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        self._unparsed += data
        *lines, self._unparsed = self._unparsed.split(b"\n")
        for line in lines:
            asyncio.get_running_loop().create_task(self._answer(msgspec.json.decode(line)))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The client is gone: the call that waits has nobody to answer."""
        if self._called is not None:
            self._called.abort()

    async def _answer(self, call: dict[str, Any]) -> None:
        try:
            polled = self._called = await self._find(call)
        except PokebridgeError as error:
            headers = error.headers if isinstance(error, RefusedError) else {}
            wait_s = float(headers["Retry-After"]) if "Retry-After" in headers else None
            self._write({"status": int(error.status), "retry_after_s": wait_s})
            return
        frames = await polled.fetch(call["wait_s"])
        self._called = None
        close = None if polled.ending is None else schema.Close(*polled.ending)
        raw = [msgspec.Raw(frame) for frame in frames]
        self._write(schema.Polled(polled.session.id, raw, close))

    async def _find(self, call: dict[str, Any]) -> PolledSession:
        identity = await self._verifier.verify(call["token"])
        if "session" not in call:
            begin = self._gateway.poll
            return begin(identity, call["device"], "", lasts=True, moved=call["moved"])
        return find(self._gateway, call["session"], identity)

    def _write(self, answer: object) -> None:
        self._transport.write(msgspec.json.encode(answer) + b"\n")


def find(gateway: Gateway, session: str, identity: Identity) -> PolledSession:
    """The session of a call. Raises NotFoundError."""
    polled = gateway.entrance.find_polled(session, identity)
    if polled is None:
        raise NotFoundError("there is no such session here")
    return polled


async def send_frames(
    gateway: Gateway, verifier: Verifier, token: str, session: str, body: bytes
) -> bool:
    """``POST /v1/pokes/frames``."""
    polled = find(gateway, session, await verifier.verify(token))
    for frame in msgspec.json.decode(body, type=schema.SentFrames).frames:
        if isinstance(frame, Listen):
            gateway.entrance.listen(polled, frame)
        else:
            gateway.entrance.unlisten(polled, frame.recipient)
    return True
