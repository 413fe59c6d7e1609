"""The delays of a client, which its users may change."""

import msgspec


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """The client's delays, in seconds.

    A delay after the n-th failure in a row is ``random * min(cap, base * 2**n)``: the jitter comes
    after the cap, so that clients stay spread however long an outage lasts.
    """

    base_s: float = 1.0
    cap_s: float = 30.0
    # After close code 1013.
    overload_base_s: float = 10.0
    overload_cap_s: float = 60.0
    # A socket that was ready this long makes the next failure the first one again.
    stable_s: float = 60.0
    # For the opening handshake; and then for ``ready``: longer than the 30 s that an instance gives
    # itself to prove the subscription, lest a slow one be left again and again.
    open_within_s: float = 10.0
    ready_within_s: float = 35.0
    # Silence after which the server is pinged, and how long it then has to send anything.
    ping_after_s: float = 30.0
    pong_within_s: float = 10.0
    # Without a socket: when slow polling starts (jitter makes it up to twice that), and its mean
    # interval.
    poll_after_s: float = 10.0
    poll_every_s: float = 30.0
    # With a socket: the mean time between two pulls without a poke, 20 % more or less. The last
    # safety net against faults of anything between the bridge and the client.
    idle_pull_s: float = 750.0
    # The shortest time between two acks over the socket, which count against the limit of frames.
    ack_every_s: float = 0.25
    # If no WebSocket works: the time between two tries, growing up to the cap.
    try_base_s: float = 10.0
    try_cap_s: float = 1800.0
