"""A call of pokebridge's that blocks the event loop fails the test that made it."""

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(scope="session", autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Watch for the whole run; the contract suites that pokebridge ships are tests, not watched."""
    with blockbuster_ctx("pokebridge", excluded_modules=["pokebridge.testing"]) as watch:
        # asyncpg looks for a password file and certificates whenever it dials.
        for function in watch.functions.values():
            function.can_block_in("asyncpg/connect_utils.py", "_parse_connect_dsn_and_args")
            # An instance that is put together counts its descriptors, which waits for no disk.
            function.can_block_in("server/descriptors.py", "_count_open")
            # grpc joins its thread where its last channel is collected, which may be anywhere.
            function.can_block_in("threading.py", "_wait_for_tstate_lock")
        yield
