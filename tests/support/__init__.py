"""What the tests share: real servers to start, a connection to cut, a browser, a way to wait.

Fixtures (``tests/conftest.py`` loads them all): ``serve``; ``nats_server``, ``valkey_server``,
``postgres_server``, ``postgres_database``, ``pubsub_emulator``, and an ``own_…`` one of each
server for tests that kill it; ``browser``; ``client_package``. Every async test fails when
pokebridge blocks its loop.
"""

from tests.support.cut_proxy import CutProxy
from tests.support.daemon import Daemon, free_port
from tests.support.serving import Instance, Serve
from tests.support.waiting import block_until, wait_until

__all__ = [
    "CutProxy",
    "Daemon",
    "Instance",
    "Serve",
    "block_until",
    "free_port",
    "wait_until",
]
