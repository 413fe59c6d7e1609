"""The Pub/Sub transport keeps the contract, over our own server and over Google's emulator."""

import secrets
from collections.abc import AsyncIterator

import pytest

from pokebridge.testing.pubsub import PubSubServer
from pokebridge.testing.transport import Connect, TransportContract
from pokebridge.transport.base import Transport
from pokebridge.transport.google_pubsub import GooglePubSubTransport


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PubSubServer]:
    """A Pub/Sub server of the test's own, which clients of this process find."""
    async with PubSubServer() as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        yield server


async def _connector() -> AsyncIterator[Connect]:
    """Transports of instances with names of their own, on a project of the test's own."""
    project = f"test-{secrets.token_hex(4)}"
    transports: list[GooglePubSubTransport] = []

    async def connect() -> Transport:
        transports.append(
            await GooglePubSubTransport.connect(
                project, instance=secrets.token_hex(4), sweep_every_s=None
            )
        )
        return transports[-1]

    yield connect
    for transport in transports:
        await transport.close()


class TestOnOwnServer(TransportContract):
    """The shipped suite, over the server that filters."""

    @pytest.fixture
    async def connect(self, server: PubSubServer) -> AsyncIterator[Connect]:
        """Instances on that server."""
        async for connect in _connector():
            yield connect


class TestOnEmulator(TransportContract):
    """The shipped suite, over Google's emulator; the adapter does the filtering it leaves out."""

    @pytest.fixture
    async def connect(
        self, pubsub_emulator: str, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Connect]:
        """Instances on the emulator."""
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub_emulator)
        async for connect in _connector():
            yield connect
