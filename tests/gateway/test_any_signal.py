"""Whatever bytes arrive as a signal: they are taken, or counted and dropped, and nothing breaks."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pokebridge.gateway.bridge import Bridge
from pokebridge.gateway.meter import SAMPLE_EVERY
from pokebridge.gateway.session_map import SessionMap
from pokebridge.gateway.subscriptions import SubscriptionManager, SubscriptionTiming
from pokebridge.transport.memory import MemoryTransport

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
FIELDS = st.dictionaries(
    st.sampled_from(["type", "recipient", "version", "pokes", "id", "other"]),
    st.sampled_from(["poke", "probe", "disconnect", "urn:user:jos\u00e9", "\ud800"])
    | JSON
    | st.lists(st.dictionaries(st.sampled_from(["recipient", "version"]), JSON)),
)


def encoded(value: object) -> bytes:
    """JSON that may be none: of lone surrogates, and of numbers that JSON does not have."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@given(st.lists(st.binary() | FIELDS.map(encoded), min_size=1, max_size=5), st.none() | st.text())
def test_no_signal_raises(bodies: list[bytes], tag: str | None) -> None:
    """Neither the bridge nor the check of tags raises, and each signal is counted."""
    bridge = Bridge(SessionMap(1))
    manager = SubscriptionManager(
        MemoryTransport(),
        bridge.on_signal,
        instance="i",
        shard_count=100,
        timing=SubscriptionTiming(),
        on_live=lambda: None,
        on_missed=lambda _: None,
    )
    bridge.counters.signals = SAMPLE_EVERY - 1  # the first one is timed
    for body in bodies:
        manager.is_mistagged(body, tag)
        bridge.on_signal(body)
    assert bridge.counters.signals == SAMPLE_EVERY - 1 + len(bodies)
    assert bridge.counters.malformed <= len(bodies)
