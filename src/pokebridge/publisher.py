"""How a backend pokes: on the transport itself, or over an instance's HTTP API.

Both publishers take pokes from any number of callers. A poke is sent at once while no other is
being sent. Otherwise it waits a few milliseconds at most, and those that wait are merged into few,
large requests. Merging is safe because a poke is level-triggered: it says "you are behind version
v", so the newest poke replaces the older ones. A call returns when its pokes have been accepted,
and raises when they may not have been.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from http import HTTPStatus
from math import inf
from time import monotonic
from types import TracebackType
from typing import Self, TypeVar

import httpx
import msgspec

from pokebridge.errors import (
    AuthError,
    ForbiddenError,
    InputError,
    NotPublishedError,
    SignalRefusedError,
    TransportError,
)
from pokebridge.model import MAX_VERSION, Poke, check_recipient
from pokebridge.outgoing import http_client
from pokebridge.poke_merger import PokeMerger
from pokebridge.sharding import DEFAULT_SHARD_COUNT, check_shard_count, shard_of
from pokebridge.transport.base import HasLimit, Signal, Transport
from pokebridge.urls import check_bridge_url
from pokebridge.wire import encode_disconnect, encode_pokes, problem_detail, refusal_text

__all__ = ["HttpPublisher", "Publisher"]

# How long a poke waits for others at most, while an earlier batch is being sent.
LINGER_S = 0.003
# At 256 bytes a recipient a signal stays under 160 KB, far below NATS's limit of 1 MB.
MAX_POKES_PER_SIGNAL = 500
# More than a signal with a single poke has beside the recipient.
MAX_OVERHEAD_BYTES = 64
# Recipients whose poke is gathered or being sent. At the limit callers wait, which slows them to
# the transport's pace and bounds the memory to about 3 MB.
MAX_PENDING_RECIPIENTS = 10_000
# The limit of one POST /v1/pokes (docs/protocol.md, section 4).
MAX_RECIPIENTS_PER_REQUEST = 1000
# For a whole call, and longer by what a large one takes on a slow line.
HTTP_TIMEOUT_S = 10.0
SLOW_LINE_BYTES_PER_S = 16_000
# The answer is one number, or one problem.
MAX_ANSWER_BYTES = 64 * 1024
# An engine that fails within this time is there, and its signals are tried one by one. After so
# many errors more than successes it counts as away.
SOON_S = 1.0
MAX_ERRORS = 2

T = TypeVar("T")


class _PokeCalls:
    """The calls that both publishers have. Each publisher merges on its own."""

    def __init__(
        self, send: Callable[[Sequence[Poke]], Awaitable[None]], linger_s: float, max_pending: int
    ) -> None:
        self._merger = PokeMerger(send, linger_s, max_pending)

    async def poke(self, recipient: str, version: int | None = None) -> None:
        """Tell ``recipient`` that it is behind ``version``, or behind some version when ``None``.

        Returns and raises as :meth:`publish` does.
        """
        await self.publish([Poke(recipient, version)])

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """Send ``pokes``, merged with those of other callers. Returns when all are accepted.

        Waits while ``max_pending`` other recipients are pending.

        Raises:
            InputError: a poke has no valid recipient or version. None of the pokes is sent.
            NotPublishedError: some of the pokes were refused, and the others are published.
            TransportError: some or all of the pokes were not accepted. A retry is safe.
        """
        _check(pokes)
        await self._merger.publish(pokes)

    async def close(self) -> None:
        """Send the gathered pokes and wait until they are accepted, 15 s at most.

        Then calls that are still waiting raise TransportError. May be called twice.
        """
        await self._merger.close()

    async def __aenter__(self) -> Self:
        """Return the publisher. The first poke opens what is needed."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()


class Publisher(_PokeCalls):
    """Publishes pokes on a transport, each tagged with its recipient's shard.

    Args:
        transport: the transport to publish on. The caller closes it.
        shard_count: the cluster's (protocol.md section 1).
        linger_s: how long a poke waits for others at most, while earlier pokes are being sent.
        max_pokes_per_signal: pokes of one shard beyond this number go into further signals.
        max_pending: recipients that may be pending; at this limit callers wait.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        shard_count: int = DEFAULT_SHARD_COUNT,
        linger_s: float = LINGER_S,
        max_pokes_per_signal: int = MAX_POKES_PER_SIGNAL,
        max_pending: int = MAX_PENDING_RECIPIENTS,
    ) -> None:
        super().__init__(self._send, linger_s, max_pending)
        self._transport = transport
        self._shard_count = check_shard_count(shard_count)
        self._max_pokes_per_signal = max_pokes_per_signal
        self.published = 0
        """Pokes that the transport has accepted, after merging."""

    async def publish(self, pokes: Sequence[Poke]) -> None:
        """As in the base class. A poke that no signal can carry is an InputError too."""
        _check(pokes)
        self._check_size(pokes)
        await super().publish(pokes)

    def _check_size(self, pokes: Sequence[Poke]) -> None:
        limit = self._transport.max_signal_bytes if isinstance(self._transport, HasLimit) else inf
        for poke in pokes:
            if len(poke.recipient) < limit / 2 - MAX_OVERHEAD_BYTES:  # an escape has two bytes
                continue
            if (size_bytes := len(encode_pokes([poke]))) > limit:
                raise InputError(
                    f"the poke for {poke.recipient} has {size_bytes} bytes, and the transport"
                    f" accepts {limit}: use a shorter recipient, or raise the engine's limit"
                    " (max_payload of NATS)"
                )

    async def publish_now(self, pokes: Sequence[Poke]) -> None:
        """Publish ``pokes`` at once, without merging. Returns when all are accepted.

        For a caller that merges by itself, as the processor does. Raises as :meth:`publish` does.
        """
        _check(pokes)
        await self._send(pokes)

    async def disconnect(
        self, recipient: str, *, at_ms: int | None = None, until_ms: int | None = None
    ) -> None:
        """Close every session of ``recipient`` with 4401, on every instance.

        With ``until_ms`` the instances that hear it also refuse, until then, the tokens of
        ``recipient`` that were issued before ``at_ms``. Both are Unix times in milliseconds.

        Raises:
            InputError: ``recipient`` is invalid.
            TransportError: the signal was not accepted.
        """
        shard = shard_of(check_recipient(recipient), self._shard_count)
        body = encode_disconnect(recipient, at_ms=at_ms, until_ms=until_ms)
        await self._transport.publish([Signal(body, shard)])

    async def _send(self, pokes: Sequence[Poke]) -> None:
        by_shard: dict[int, list[Poke]] = defaultdict(list)
        for poke in pokes:
            by_shard[shard_of(poke.recipient, self._shard_count)].append(poke)
        attempt = _Attempt(self._transport)
        for shard, its_pokes in by_shard.items():
            for some in _chunks(its_pokes, self._max_pokes_per_signal):
                attempt.add(some, shard)
        try:
            await attempt.publish()
        finally:
            self.published += attempt.published
        if attempt.refused:
            raise NotPublishedError(
                f"{len(attempt.refused)} of {len(pokes)} pokes were refused: {attempt.reason}",
                frozenset(attempt.refused),
                frozenset(attempt.too_large),
            )


class _Attempt:
    """One attempt to publish pokes, so that one which is refused harms no other.

    All signals are published at once. When the engine refuses that, each is published alone, and
    one that is too large is halved until it fits.

    - ``published``: how many pokes were accepted
    - ``refused``, ``too_large``: the recipients of those that were not; the latter never will be
    - ``reason``: why not, of the last one
    - ``_signals``: what is left to publish, and the pokes of each
    """

    def __init__(self, transport: Transport) -> None:
        self.published = 0
        self.refused: set[str] = set()
        self.too_large: set[str] = set()
        self.reason = ""
        self._transport = transport
        self._limit = transport.max_signal_bytes if isinstance(transport, HasLimit) else inf
        self._signals: deque[tuple[Signal, Sequence[Poke]]] = deque()

    def add(self, pokes: Sequence[Poke], shard: int) -> None:
        """Add ``pokes`` in signals that the engine accepts, as far as it has told its limit."""
        body = encode_pokes(pokes)
        if len(body) <= self._limit:
            self._signals.append((Signal(body, shard), pokes))
        else:
            reason = f"the signal has {len(body)} bytes, and the engine accepts {self._limit}"
            self._halve(pokes, shard, reason)

    async def publish(self) -> None:
        """Publish everything that was added.

        Raises:
            TransportError: the engine does not work now. Some signals may have been published.
        """
        began_s = monotonic()
        signals = [signal for signal, _ in self._signals]
        try:
            if signals:
                await self._transport.publish(signals)
        except Exception as error:
            if not isinstance(error, SignalRefusedError) and (
                len(signals) == 1 or monotonic() - began_s > SOON_S
            ):
                raise
            await self._publish_one_by_one()
        else:
            self.published = sum(len(pokes) for _, pokes in self._signals)

    async def _publish_one_by_one(self) -> None:
        errors = 0
        while self._signals:
            signal, pokes = self._signals.popleft()
            try:
                await self._transport.publish([signal])
            except SignalRefusedError as error:
                if error.is_too_large:
                    self._halve(pokes, signal.shard or 0, str(error))
                else:
                    self._refuse(pokes, str(error))
            except Exception as error:
                errors += 1
                if errors - self.published > MAX_ERRORS or not (self._signals or self.published):
                    raise
                self._refuse(pokes, str(error))
            else:
                self.published += len(pokes)

    def _halve(self, pokes: Sequence[Poke], shard: int, reason: str) -> None:
        if len(pokes) == 1:
            self.too_large.add(pokes[0].recipient)
            self._refuse(pokes, reason)
        else:
            middle = len(pokes) // 2
            self.add(pokes[:middle], shard)
            self.add(pokes[middle:], shard)

    def _refuse(self, pokes: Sequence[Poke], reason: str) -> None:
        self.refused.update(poke.recipient for poke in pokes)
        self.reason = reason


class HttpPublisher(_PokeCalls):
    """Pokes through an instance's ``POST /v1/pokes``, for a backend without a transport.

    The HTTP call carries no versions, so clients pull on every poke. :meth:`publish` also raises
    :class:`~pokebridge.errors.AuthError` when the token is refused and
    :class:`~pokebridge.errors.ForbiddenError` when it lacks the scope ``poke``.

    Args:
        url: the instance's HTTP address, ``https://bridge.example.org``.
        token: a JWT with the scope ``poke``, or a coroutine function that returns a fresh one. The
            function is called before every request.
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
        super().__init__(self._send, linger_s, max_pending)
        self._url = check_bridge_url("the publisher's url", url) + "/v1/pokes"
        self._token = token
        self._http = http_client(self._url, timeout=None)  # _post has a deadline

    async def close(self) -> None:
        """Send the gathered pokes, wait until they are accepted, and close the connections.

        As the other publisher's, it takes 15 s at most.
        """
        await super().close()
        await self._http.aclose()

    async def _send(self, pokes: Sequence[Poke]) -> None:
        recipients = [poke.recipient for poke in pokes]
        for some in _chunks(recipients, MAX_RECIPIENTS_PER_REQUEST):
            await self._post(some)

    async def _post(self, recipients: Sequence[str]) -> None:
        content = msgspec.json.encode({"recipients": recipients})
        timeout_s = HTTP_TIMEOUT_S + len(content) / SLOW_LINE_BYTES_PER_S
        try:
            # httpx limits each step only, so an answer that drips would never end.
            async with asyncio.timeout(timeout_s):
                await self._call(content)
        except TimeoutError:
            raise TransportError(f"{self._url} did not answer within {timeout_s:.0f} s") from None
        except httpx.HTTPError as error:
            raise TransportError(f"{self._url} can't be reached: {error!r}") from error

    async def _call(self, content: bytes) -> None:
        token = self._token if isinstance(self._token, str) else await self._token()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = self._http.build_request("POST", self._url, content=content, headers=headers)
        response = await self._http.send(request, stream=True)
        try:
            body = await _read(response)
        finally:
            await response.aclose()
        _check_accepted(response, body)


class _Accepted(msgspec.Struct):
    accepted: int


def _check(pokes: Sequence[Poke]) -> None:
    """Raise InputError before merging, since an invalid poke would fail the whole batch."""
    for poke in pokes:
        check_recipient(poke.recipient)
        if poke.version is not None and not 1 <= poke.version <= MAX_VERSION:
            raise InputError(f"a version is from 1 to {MAX_VERSION}, not {poke.version}")


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


async def _read(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise TransportError(f"{response.url} answered more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _check_accepted(response: httpx.Response, body: bytes) -> None:
    """Raise unless an instance has accepted the pokes.

    What stands between, a proxy or a login page, may answer anything. Then a retry may succeed.
    """
    status = response.status_code
    if status == HTTPStatus.ACCEPTED:
        with suppress(ValueError, RecursionError):
            msgspec.json.decode(body, type=_Accepted)
            return
    detail = problem_detail(status, response.headers.get("Content-Type"), body)
    said = refusal_text(str(response.url), status, detail)
    if detail is None:
        raise TransportError(said)
    if status == HTTPStatus.UNAUTHORIZED:
        raise AuthError(said)
    if status == HTTPStatus.FORBIDDEN:
        raise ForbiddenError(said)
    if response.is_client_error and status != HTTPStatus.TOO_MANY_REQUESTS:
        raise InputError(said)
    raise TransportError(said)
