"""What the transports' tests share."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from pokebridge.testing.pubsub import PubSubServer
from pokebridge.transport import google_pubsub
from tests.transport.certificates import Certificates, make_certificates
from tests.transport.pubsub_world import Clock, World


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority's certificate and one of its own making for 127.0.0.1."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def clock() -> Clock:
    """The clock of ``server``."""
    return Clock()


@pytest.fixture
async def server(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PubSubServer]:
    """A Pub/Sub server of the test's own, which clients of this process find."""
    async with PubSubServer(clock=clock) as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        yield server


@pytest.fixture
async def world(server: PubSubServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A world on our own server, which behaves as Google's service does."""
    _refuse_quickly(monkeypatch)
    async with World(server.address) as world:
        yield world


@pytest.fixture
async def emulated(pubsub_emulator: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A world on Google's emulator."""
    _refuse_quickly(monkeypatch)
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", pubsub_emulator)
    async with World(pubsub_emulator, is_emulator=True) as world:
        yield world


@pytest.fixture(params=["own", "emulator"])
async def either(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """A world on each of the two, one after the other."""
    _refuse_quickly(monkeypatch)
    async with AsyncExitStack() as stack:
        is_emulator = request.param == "emulator"
        if is_emulator:
            address = request.getfixturevalue("pubsub_emulator")
        else:
            address = (await stack.enter_async_context(PubSubServer())).address
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        yield await stack.enter_async_context(World(address, is_emulator=is_emulator))


def _refuse_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on this machine refuses a stream within a tenth of a second, if it does."""
    monkeypatch.setattr(google_pubsub, "AWAIT_REFUSAL_S", 0.1)
