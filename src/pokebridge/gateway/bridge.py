"""The signal bridge: from the transport's signals to this instance's sockets.

``handle_poke`` is the seed's ``handlePoke``: it looks into the local session map and routes or
drops. Around it the bridge keeps the subscription *proven live*, for a session may be told
``ready`` only then, and a gap must wake everyone whom it may have left asleep.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from pokebridge.errors import SignalError, TransportError
from pokebridge.gateway.connection import Connection
from pokebridge.gateway.meter import SAMPLE_EVERY, Meter, Traffic
from pokebridge.gateway.session_map import SessionMap
from pokebridge.model import Poke
from pokebridge.transport.base import Feed, Selection, Signal, Subscription, Transport
from pokebridge.wire import Disconnect, Probe, decode_signal, encode_probe, poke_frame

log = structlog.get_logger(__name__)

_WAKE_BATCH = 500  # sessions poked between two turns of the loop


@dataclass(frozen=True, slots=True)
class BridgeTiming:
    """How the bridge watches its subscription; seconds unless named otherwise."""

    silence_s: float = 5.0
    """After so long without any signal, a probe asks whether the subscription still delivers."""
    probe_timeout_s: float = 2.0
    retry_s: float = 0.5
    """Between two probes of a subscription that does not deliver, on average."""
    pulls_per_s: float = 1000.0
    """The rate to which the pulls after a gap are spread."""


@dataclass(slots=True)
class BridgeCounters:
    """What the bridge has seen since its start; read when metrics are scraped."""

    signals: int = 0
    malformed: int = 0
    pokes: int = 0
    noise: int = 0
    """Pokes for recipients that have no session here."""
    delivered: int = 0
    merged: int = 0
    gaps: int = 0
    probes: int = 0


class Bridge:
    """Feeds the sessions of one instance from one transport."""

    def __init__(
        self,
        transport: Transport,
        sessions: SessionMap[Connection],
        *,
        instance: str,
        timing: BridgeTiming | None = None,
        on_live: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._sessions = sessions
        self._instance = instance
        self._timing = timing or BridgeTiming()
        self._on_live = on_live
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._meter = Meter()
        self._doubt = asyncio.Event()
        self._missed = False
        self._probe_id: str | None = None
        self._probe_back = asyncio.Event()
        self._trouble: str | None = "the subscription is not proven yet"
        self.counters = BridgeCounters()

    @property
    def trouble(self) -> str | None:
        """Why the subscription is not known to deliver; ``None`` when it is."""
        return self._trouble

    @property
    def live(self) -> bool:
        """Whether a poke published from now on reaches this instance."""
        return self._trouble is None

    @property
    def traffic(self) -> Traffic:
        """What reaches this instance now, and what of it is noise."""
        return self._meter.read(self.counters.signals)

    async def start(self) -> None:
        """Subscribe and prove the subscription live, then keep watch over it.

        Raises:
            TransportError: the transport can't be had; a start should say so, not wait.
        """
        self._subscription = await self._transport.subscribe(Feed.ALL, self)
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._keep_time())]

    async def close(self) -> None:
        """Stop watching and give the subscription back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._subscription is not None:
            await self._subscription.close()

    # --- the way of a poke ----------------------------------------------------------------------

    def on_signal(self, body: bytes) -> None:
        """Take a signal from the transport; a body that is none of ours is counted and dropped."""
        counters = self.counters
        counters.signals += 1
        if counters.signals % SAMPLE_EVERY:
            self._take(body)
            return
        pokes, noise, started_s = counters.pokes, counters.noise, time.thread_time()
        self._take(body)
        if counters.pokes > pokes:
            others = (counters.noise - noise) / (counters.pokes - pokes)
            self._meter.add_noise((time.thread_time() - started_s) * others)

    def _take(self, body: bytes) -> None:
        try:
            content = decode_signal(body)
        except SignalError:
            self.counters.malformed += 1
            return
        if isinstance(content, Probe):
            if content.id == self._probe_id:
                self._probe_back.set()
        elif isinstance(content, Disconnect):
            for connection in self._sessions.find(content.recipient):
                connection.close(4401, "disconnected by an administrator")
        else:
            for poke in content:
                self.handle_poke(poke)

    def handle_poke(self, poke: Poke) -> None:
        """Route ``poke`` to its recipient's sessions here, or drop it."""
        counters = self.counters
        counters.pokes += 1
        connections = self._sessions.find(poke.recipient)
        if not connections:
            counters.noise += 1
            return
        frame = poke_frame(poke.version)
        for connection in connections:
            if connection.notify(poke.version, frame):
                counters.delivered += 1
            else:
                counters.merged += 1

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Signals may have been lost: prove the subscription anew, then wake everyone."""
        self.counters.gaps += 1
        self._lose(f"a gap in the transport ({selection}): {reason}")
        self._doubt.set()

    # --- the watch over the subscription --------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            self._doubt.clear()
            while not await self._prove():  # noqa: ASYNC110 - it is the probe that waits
                await asyncio.sleep(_spread(self._timing.retry_s, 0.5))
            missed, self._missed, self._trouble = self._missed, False, None
            self._on_live()
            if missed:
                log.warning("subscription restored", sessions=len(self._sessions))
                await self._wake_everyone()
            await self._until_doubt()

    async def _prove(self) -> bool:
        """Whether a probe comes back in time."""
        self.counters.probes += 1
        self._probe_id = f"{self._instance}:{self.counters.probes}"
        self._probe_back.clear()
        try:
            async with asyncio.timeout(self._timing.probe_timeout_s):
                await self._transport.publish([Signal(encode_probe(self._probe_id))])
                await self._probe_back.wait()
        except TimeoutError:
            self._lose("no probe came back")
            return False
        except TransportError as error:
            self._lose(str(error))
            return False
        return True

    def _lose(self, trouble: str) -> None:
        """The subscription is not known to deliver any more, and may have missed something."""
        if self._trouble is None:
            log.warning("subscription in doubt", reason=trouble)
            self._missed = True
        self._trouble = trouble

    async def _until_doubt(self) -> None:
        """Return on a gap, or when nothing at all was heard for a while.

        Any signal proves that the subscription delivers, another instance's probe too: so a quiet
        cluster of N spends about one probe an interval, not N.
        """
        while True:
            heard = self.counters.signals
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_spread(self._timing.silence_s, 0.2)):
                    await self._doubt.wait()
                return
            if self.counters.signals == heard:
                return

    async def _keep_time(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._meter.mark(self.counters.signals)

    async def _wake_everyone(self) -> None:
        """Poke every session, with a window for its pull that grows with their number."""
        connections = list(self._sessions)
        within_ms = int(len(connections) / self._timing.pulls_per_s * 1000)
        frame = poke_frame(None, within_ms)
        for start in range(0, len(connections), _WAKE_BATCH):
            for connection in connections[start : start + _WAKE_BATCH]:
                connection.notify(None, frame)
            await asyncio.sleep(0)


def _spread(seconds: float, share: float) -> float:
    """``seconds``, give or take a ``share`` of it, so that instances do not march in step."""
    return seconds * random.uniform(1 - share, 1 + share)  # noqa: S311 - spreads load
