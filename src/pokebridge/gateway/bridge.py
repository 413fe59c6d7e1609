"""The signal bridge: from a signal's bytes to this instance's sockets.

``handle_poke`` is ``handlePoke`` of docs/roadmap.md. It looks the recipient up in the local session
map, and forwards the poke or drops it. It knows nothing about shards, modes or subscriptions, so a
migration does not change it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pokebridge.errors import SignalError
from pokebridge.gateway.audiences import LARGE, Audiences, Walks
from pokebridge.gateway.disconnects import SLACK_S, Disconnects
from pokebridge.gateway.listener import Listener
from pokebridge.gateway.meter import SAMPLE_EVERY, Meter, Traffic
from pokebridge.gateway.session_map import SessionMap
from pokebridge.model import Poke
from pokebridge.wire import (
    MISSED,
    Beacon,
    Disconnect,
    Lookup,
    decode_signal,
    poke_frame,
    salvage_pokes,
)


@dataclass(slots=True)
class BridgeCounters:
    """What the bridge has counted since its start. Read when metrics are scraped."""

    signals: int = 0
    malformed: int = 0
    pokes: int = 0
    """Pokes that the signals carried."""
    noise: int = 0
    """Pokes for recipients that have no session here."""
    delivered: int = 0
    merged: int = 0


class Bridge:
    """Routes the signals of one instance to its sessions."""

    def __init__(
        self, sessions: SessionMap[Listener], pulls_per_s: Callable[[], float] = lambda: 1000.0
    ) -> None:
        """``pulls_per_s`` is the rate to which the pulls of a large audience are spread."""
        self._sessions = sessions
        self.walks = Walks()
        """What is done to many sessions, by its ``run``."""
        self.audiences = Audiences(self.walks, pulls_per_s, self._notify, self.handle_poke)
        """Pokes the recipients with many sessions."""
        self._meter = Meter()
        self.counters = BridgeCounters()
        self.on_beacon: Callable[[Beacon], None] = lambda _: None
        """Called with each beacon, this instance's own ones included."""
        self.on_lookup: Callable[[Lookup], None] = lambda _: None
        """Called with each question for a recipient's sessions, and each answer to one."""
        self.disconnects = Disconnects()
        """The recent disconnects, and the revocations in force."""
        self.on_asked: Callable[[], None] = lambda: None
        """Called when an instance asks for the recent disconnects."""
        self.on_revoked: Callable[[Disconnect], None] = lambda _: None
        """Called with each revocation of tokens, before the sessions are closed."""

    def on_signal(self, body: bytes) -> None:
        """Take a signal. An invalid body is counted and dropped, except for its valid pokes."""
        counters = self.counters
        counters.signals += 1
        if counters.signals % SAMPLE_EVERY:
            self._take(body)
            return
        pokes, noise = counters.pokes, counters.noise
        cpu_s = self._take_timed(body)
        if counters.pokes > pokes:
            others = (counters.noise - noise) / (counters.pokes - pokes)
            self._meter.add_noise(cpu_s * others)

    def _take_timed(self, body: bytes) -> float:
        """Take a signal. Returns its CPU time in seconds, without that of reading the clock.

        The first reading of the clock after a while takes several times as long as the next. It
        would make the result a third too high (benchmarks/profiled.py).
        """
        thread_time = time.thread_time
        thread_time()
        before_s = thread_time()
        started_s = thread_time()
        self._take(body)
        return max(0.0, thread_time() - started_s - (started_s - before_s))

    def _take(self, body: bytes) -> None:
        try:
            content = decode_signal(body)
        except SignalError:
            self.counters.malformed += 1
            content = salvage_pokes(body)
        if isinstance(content, list):  # first, since almost all signals are pokes
            self.counters.pokes += len(content)
            for poke in content:
                self.handle_poke(poke)
        elif isinstance(content, Disconnect):
            self.disconnect(content)
        elif isinstance(content, Beacon):
            self.on_beacon(content)
        elif isinstance(content, Lookup):
            self.on_lookup(content)
        elif content.id.startswith(MISSED):
            self.on_asked()

    def disconnect(self, disconnect: Disconnect) -> None:
        """Close the recipient's sessions here. Keep ``disconnect`` for instances that missed it."""
        now_s = time.time()
        at_ms = int(now_s * 1000) if disconnect.at_ms is None else disconnect.at_ms
        disconnect = disconnect._replace(at_ms=at_ms)
        is_new = self.disconnects.note(disconnect, now_s)
        if is_new and disconnect.until_ms is not None:
            self.on_revoked(disconnect)
        if disconnect.is_repeated and not is_new:
            return
        connections = self._sessions.find(disconnect.recipient)
        if disconnect.is_repeated:
            before_s = at_ms / 1000 + SLACK_S
            connections = [each for each in connections if each.began_at < before_s]
        self.walks.do(connections, lambda it: it.close(4401, "disconnected by an administrator"))

    def handle_poke(self, poke: Poke) -> None:
        """Route ``poke`` to its recipient's sessions here, or drop it."""
        counters = self.counters
        connections = self._sessions.find(poke.recipient)
        if not connections:
            counters.noise += 1
            return
        if len(connections) > LARGE:
            self.audiences.poke(poke, connections)
            return
        frame = poke_frame(poke.version)
        for connection in tuple(connections):  # as in _notify, without a call for each session
            if connection.notify(poke.version, frame):
                counters.delivered += 1
            else:
                counters.merged += 1

    def _notify(self, connection: Listener, version: int | None, frame: bytes) -> None:
        if connection.notify(version, frame):
            self.counters.delivered += 1
        else:
            self.counters.merged += 1

    def wake(self, concerns: Callable[[str], bool], pulls_per_s: float) -> None:
        """Poke the sessions of the recipients for which ``concerns`` is true.

        The poke asks each client to wait a random time first, so that all of them together pull at
        most ``pulls_per_s`` times a second.
        """
        connections = [each for each in self._sessions if concerns(each.recipient)]
        frame = poke_frame(None, within_ms=int(len(connections) / pulls_per_s * 1000))
        self.walks.do(connections, lambda it: it.notify(None, frame))

    # --- traffic ----------------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """The recent rate of signals, and the CPU share of those for others."""
        return self._meter.read(self.counters.signals)

    def mark_time(self) -> None:
        """Move the window of ``traffic`` on. Call it about once a second."""
        self._meter.mark(self.counters.signals)
