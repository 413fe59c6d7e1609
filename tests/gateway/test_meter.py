"""The meter: what reaches an instance, and how much of its CPU time is spent on others' pokes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pokebridge.gateway import bridge as bridge_module
from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.meter import SAMPLE_EVERY, WINDOW_S, Meter
from pokebridge.gateway.session_map import SessionMap
from pokebridge.model import Poke
from pokebridge.wire import encode_pokes, encode_probe


@dataclass
class Clocks:
    """A wall clock and the process's CPU clock, both set by hand."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def meter(self) -> Meter:
        """A meter that reads these clocks."""
        return Meter(lambda: self.wall_s, lambda: self.cpu_s)


def test_the_rate_is_that_of_the_window() -> None:
    """After ten seconds at one rate, earlier rates do not count."""
    clocks = Clocks()
    meter, signals = clocks.meter(), 0
    for per_s in [1000] * 20 + [5] * int(WINDOW_S):
        clocks.wall_s += 1
        signals += per_s
        meter.mark(signals)
    assert meter.read(signals).messages_per_s == 5


def test_before_a_whole_window_the_rate_is_that_since_the_start() -> None:
    """Two seconds after the start, the rate is of two seconds."""
    clocks = Clocks()
    meter = clocks.meter()
    clocks.wall_s = 2
    assert meter.read(50).messages_per_s == 25


def test_the_rate_includes_what_came_since_the_last_mark() -> None:
    """A reading between two marks is up to date."""
    clocks = Clocks()
    meter = clocks.meter()
    clocks.wall_s = 1
    meter.mark(10)
    clocks.wall_s = 2
    assert meter.read(30).messages_per_s == 15


def test_a_reading_at_once_is_a_number() -> None:
    """No time and no CPU have passed: nothing is divided by zero."""
    traffic = Clocks().meter().read(0)
    assert (traffic.messages_per_s, traffic.noise_ratio) == (0, 0)


def test_the_noise_ratio_is_a_share_of_the_cpu_time() -> None:
    """A sampled signal stands for all of its kind."""
    clocks = Clocks()
    meter = clocks.meter()
    meter.add_noise(0.001)
    clocks.wall_s, clocks.cpu_s = 1, 4 * 0.001 * SAMPLE_EVERY
    assert meter.read(SAMPLE_EVERY).noise_ratio == pytest.approx(0.25)


def test_the_noise_ratio_is_at_most_one() -> None:
    """One slow sample that stands for others can't say that more than all CPU time was noise."""
    clocks = Clocks()
    meter = clocks.meter()
    meter.add_noise(1.0)
    clocks.wall_s = clocks.cpu_s = 1
    assert meter.read(SAMPLE_EVERY).noise_ratio == 1


def test_old_noise_leaves_the_window() -> None:
    """After a quiet window the ratio is 0, whatever was before."""
    clocks = Clocks()
    meter = clocks.meter()
    meter.add_noise(0.001)
    for _ in range(int(WINDOW_S) + 1):
        clocks.wall_s += 1
        clocks.cpu_s += 1
        meter.mark(SAMPLE_EVERY)
    assert meter.read(SAMPLE_EVERY).noise_ratio == 0


@dataclass
class _Session:
    recipient: str
    is_session = True

    def notify(self, _version: int | None, _frame: bytes) -> bool:
        return True


@pytest.mark.parametrize(
    ("body", "noise_cpu_s"),
    [
        (encode_pokes([Poke("alice")]), 5.0),
        (encode_pokes([Poke("alice"), Poke("bob")]), 2.5),
        (encode_pokes([Poke("bob")]), 0.0),
        (encode_probe("another:1"), 0.0),
        (b"no signal", 0.0),
    ],
    ids=["others", "half", "ours", "probe", "malformed"],
)
def test_one_signal_in_many_is_timed(
    body: bytes, noise_cpu_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its CPU time, freed of that of reading the clock, counts by the share of others' pokes."""
    clocks = Clocks()
    monkeypatch.setattr(bridge_module, "Meter", clocks.meter)
    sessions: SessionMap[_Session] = SessionMap(1)
    sessions.add(_Session("bob"))
    bridge = Bridge(sessions)  # type: ignore[arg-type] # all that it uses of a connection
    for _ in range(SAMPLE_EVERY - 1):
        bridge.on_signal(body)
    monkeypatch.setattr("time.thread_time", _ticking(0.0, 1.0, 2.0, 8.0))  # 6 s, less 1 s
    bridge.on_signal(body)
    clocks.wall_s, clocks.cpu_s = 1, 10 * SAMPLE_EVERY
    assert bridge.traffic.noise_ratio == pytest.approx(noise_cpu_s / 10)
    assert bridge.traffic.messages_per_s == SAMPLE_EVERY


def _ticking(*readings_s: float) -> Callable[[], float]:
    """A clock that gives these readings, and fails at one too many: only one signal is timed."""
    return iter(readings_s).__next__
