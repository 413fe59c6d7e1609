"""The limits of the link that NATS and Redis share; ``outages.py`` has the outages themselves."""

from pokebridge.transport import reconnecting_link


def test_the_limits_are_those_that_the_docs_state() -> None:
    """A cut is noticed after 4 to 6 s, and a server that is back is used again within 5 s."""
    link = reconnecting_link
    assert link.SILENT_BEATS * link.HEARTBEAT_S == 4
    assert (link.SILENT_BEATS + 1) * link.HEARTBEAT_S == 6
    assert link.BACKOFF_CAP_S + link.DIAL_TIMEOUT_S < 5
