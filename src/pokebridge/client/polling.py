"""A socket for networks that let no WebSocket pass: HTTP calls that wait fetch its frames."""

import asyncio
from collections import deque
from http import HTTPStatus
from ssl import SSLContext
from time import monotonic
from typing import Any

import httpx
import msgspec

from pokebridge.client.events import Closed, Refused
from pokebridge.client.pulling import KEEPALIVE_S, MAX_ANSWER_BYTES
from pokebridge.errors import AnswerTooLongError
from pokebridge.outgoing import Answer, has_valid_host, http_client, read_answer
from pokebridge.wire import CONNECT_PATH

POKES_PATH = "/v1/pokes"
FRAMES_PATH = "/v1/pokes/frames"
SENT_OVER_HTTP = frozenset({"listen", "unlisten"})
"""The client messages that a separate call sends to a polled session."""
# The most frames of one such call.
FRAMES_AT_ONCE = 20
ABNORMAL_CLOSURE = 1006  # RFC 6455, section 7.4.1: no close frame came
OPEN_WAIT_S = 5.0
WAIT_S = 25.0
LEAST_WAIT_S = 3.0
# After something has cut a call, the next calls wait for this share of the time that it lasted.
_SHARE = 0.7
# An empty answer that comes sooner did not wait. The next call would not either, so it is delayed
# until then.
EMPTY_AFTER_S = 1.0
# Shows the core that the bridge is alive although it has sent no frame.
NOTHING_NEW = '{"type":"pong"}'


class PollEndedError(Exception):
    """The session has ended, or a call has failed: ``event`` says how."""

    def __init__(self, event: Refused | Closed) -> None:
        super().__init__(event.reason)
        self.event = event


class _Close(msgspec.Struct, frozen=True):
    code: int
    reason: str = ""


class _Answer(msgspec.Struct, frozen=True):
    session: str
    frames: tuple[msgspec.Raw, ...]
    close: _Close | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class Poller:
    """Opens polled sockets, and remembers how long a call may wait on this network."""

    def __init__(self, url: str, tls: SSLContext | None) -> None:
        """``url`` is the bridge's HTTP address."""
        limits = httpx.Limits(keepalive_expiry=KEEPALIVE_S)
        self.http = http_client(url, tls=tls, timeout=None, limits=limits)
        self.wait_s = WAIT_S
        """How long a call waits. Shorter once something between has cut one."""

    async def open(self, url: str, query: dict[str, str], token: str) -> "PolledSocket":
        """Begin a session at ``url``, a WebSocket address.

        Raises:
            PollEndedError: it is refused, or nobody answers.
        """
        http_url = _http_url(url)
        if not has_valid_host(http_url):
            reason = "the address that the bridge has named has no valid host"
            raise PollEndedError(Closed(ABNORMAL_CLOSURE, reason))
        polled = PolledSocket(self, http_url, query)
        await polled.fetch(token, min(OPEN_WAIT_S, self.wait_s))
        return polled

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()


class PolledSocket:
    """One session. Its frames come as from a WebSocket, and :data:`SENT_OVER_HTTP` can be sent."""

    def __init__(self, poller: Poller, url: str, query: dict[str, str]) -> None:
        self._poller = poller
        self._url = url
        self._query = query
        self._frames: deque[str] = deque()
        self._close: _Close | None = None
        self._unsent: list[dict[str, Any]] = []
        self._is_sending = False

    async def recv(self, token: str) -> str:
        """The next frame. The calls that fetch it carry ``token``.

        Raises:
            PollEndedError: there is none any more.
        """
        if not self._frames and self._close is None:
            await self.fetch(token, self._poller.wait_s)
        if self._frames:
            return self._frames.popleft()
        if self._close is not None:
            raise PollEndedError(Closed(self._close.code, self._close.reason))
        return NOTHING_NEW

    async def fetch(self, token: str, wait_s: float) -> None:
        """Make one call. Raises PollEndedError."""
        began_s = monotonic()
        try:
            answer = await self._call(token, wait_s)
        except PollEndedError:
            took_s = monotonic() - began_s
            if LEAST_WAIT_S < took_s < wait_s:
                self._poller.wait_s = max(took_s * _SHARE, LEAST_WAIT_S)
            raise
        self._query = {"session": answer.session}
        self._frames.extend(bytes(frame).decode(errors="replace") for frame in answer.frames)
        self._close = answer.close
        early_s = began_s + EMPTY_AFTER_S - monotonic()
        if early_s > 0 and not (answer.frames or answer.close):
            await asyncio.sleep(early_s)

    async def send(self, message: dict[str, Any], token: str) -> None:
        """Send ``message``, together with others that come while an earlier one is on its way.

        Raises:
            PollEndedError: it has not arrived.
        """
        self._unsent.append(message)
        if self._is_sending:
            return
        self._is_sending = True
        try:
            while frames := self._unsent[:FRAMES_AT_ONCE]:
                del self._unsent[:FRAMES_AT_ONCE]
                url = self._url.removesuffix(POKES_PATH) + FRAMES_PATH
                body, query = {"frames": frames}, self._query
                await self._request("POST", url, token, HTTPStatus.NO_CONTENT, query, json=body)
        finally:
            self._is_sending = False

    async def _call(self, token: str, wait_s: float) -> _Answer:
        query = {**self._query, "wait_s": f"{wait_s:g}"}
        body = await self._request("GET", self._url, token, HTTPStatus.OK, query)
        try:
            return _decode(body)
        except (ValueError, RecursionError) as error:
            reason = f"{self._url} does not answer as an instance of pokebridge: {error}"
            raise PollEndedError(Closed(ABNORMAL_CLOSURE, reason)) from None

    async def _request(
        self,
        method: str,
        url: str,
        token: str,
        expected: int,
        query: dict[str, str],
        *,
        json: object = None,
    ) -> bytes:
        """The body of the answer. The core limits the time, which a dripping answer uses up."""
        headers = {"Authorization": f"Bearer {token}"}
        try:
            async with self._poller.http.stream(
                method, url, params=query, headers=headers, json=json
            ) as response:
                answer = await read_answer(url, response, MAX_ANSWER_BYTES)
        except AnswerTooLongError as error:
            raise PollEndedError(Closed(ABNORMAL_CLOSURE, str(error))) from None
        except httpx.HTTPError as error:
            raise PollEndedError(Closed(ABNORMAL_CLOSURE, repr(error))) from error
        if answer.status != expected:
            raise PollEndedError(refused(answer))
        return answer.body


def _http_url(url: str) -> str:
    """The URL for the frames of the instance that accepts WebSockets at ``url``."""
    base = url.partition("?")[0].removesuffix(CONNECT_PATH)
    return f"http{base.removeprefix('ws')}{POKES_PATH}"


def refused(answer: Answer) -> Refused | Closed:
    """What ``answer`` to a handshake means. Only the bridge's own can be about a token."""
    if answer.detail is None and answer.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return Closed(ABNORMAL_CLOSURE, answer.text)
    return Refused(answer.status, answer.retry_after_s, answer.text)
