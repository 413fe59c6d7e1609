"""Coordination through NATS."""

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tests.support import Daemon, free_port

from pokebridge.coordination.base import Coordination
from pokebridge.coordination.nats import NatsCoordination
from pokebridge.testing.coordination import Connect, CoordinationContract


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    """X"""
    port = free_port()
    d = Daemon(
        "nats-server",
        [
            str(Path(sys.executable).parent / "nats-server"),
            "--addr",
            "127.0.0.1",
            "--port",
            str(port),
            "--jetstream",
            "--store_dir",
            str(tmp_path / "js"),
        ],
        port=port,
        url=f"nats://127.0.0.1:{port}",
        directory=tmp_path,
    )
    d.start()
    yield d
    d.kill()


class TestContract(CoordinationContract):
    """The shipped suite."""

    @pytest.fixture
    async def connect(self, server: Daemon) -> AsyncIterator[Connect]:
        """Stores on a new database."""
        async with AsyncExitStack() as stack:

            async def connect() -> Coordination:
                store = await NatsCoordination.connect(server.url, cluster="default")
                stack.push_async_callback(store.close)
                return store

            yield connect
