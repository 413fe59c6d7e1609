"""What NATS and Redis have in common beyond outages: starts, tools, permissions, TLS.

Each suite names the fixtures that it needs. ``connect_url(url, topic="…")`` and
``connect_topic(topic)`` (at the session's server) return a new transport, closed afterwards.
"""

import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from pokebridge.errors import TransportError
from pokebridge.gateway.config import GatewayConfig
from pokebridge.gateway.gateway import Gateway
from pokebridge.gateway.meter import SAMPLE_EVERY
from pokebridge.testing.transport import (
    Connect,
    RecordingReceiver,
    TransportContract,
    prove_live,
    subscribe_live,
)
from pokebridge.tokens import TokenVerifier
from pokebridge.transport import reconnecting_link
from pokebridge.transport.base import Explains, Feed, Signal, Transport
from tests.support import free_port, wait_until
from tests.transport.certificates import Certificates
from tests.transport.outages import assert_hears

ConnectUrl = Callable[..., Awaitable[Any]]
PublishByHand = Callable[[str, bytes], Awaitable[None]]
TlsServer = Callable[..., AbstractAsyncContextManager[str]]
"""``tls_server(ask=False)``: its URL without a query; ``ask`` for the client's certificate."""

BAD_SIGNALS = [
    '{"recipient":"urn:user:josé"}'.encode(),
    b'{"recipient":"u","x":' + b"[" * 3_000 + b"]" * 3_000 + b"}",
    b'{"recipient":"\\ud800"}',
    b'{"recipient":"u","version":' + b"9" * 5_000 + b"}",
]

_topics = itertools.count()


@asynccontextmanager
async def closing_all(connect: ConnectUrl) -> AsyncIterator[ConnectUrl]:
    """``connect``, whose transports are closed at the end."""
    async with AsyncExitStack() as stack:

        async def connect_and_note(*args: Any, **settings: Any) -> Transport:
            transport: Transport = await connect(*args, **settings)
            stack.push_async_callback(transport.close)
            return transport

        yield connect_and_note


class EngineContract(TransportContract):
    """The shipped suite, each test on a topic of its own. Fixture ``connect_topic``."""

    @pytest.fixture
    def connect(self, connect_topic: ConnectUrl) -> Connect:
        """Transports to the session's server."""
        topic = f"push-notifications-{next(_topics)}"
        return lambda: connect_topic(topic)


class StartContract:
    """Starts that can't be. ``scheme`` is the URL's; fixture ``connect_url``."""

    scheme: str

    async def test_an_unreachable_server(self, connect_url: ConnectUrl) -> None:
        """One line that names the server, without the password."""
        address = f"127.0.0.1:{free_port()}"
        with pytest.raises(TransportError, match=f"{self.scheme}://{address}: .*111") as caught:
            await connect_url(f"{self.scheme}://me:s3cret@{address}")
        assert "s3cret" not in str(caught.value)
        assert "\n" not in str(caught.value)

    async def test_a_server_that_says_nothing(
        self, connect_url: ConnectUrl, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A start against a port that accepts and is silent fails in bounded time."""
        monkeypatch.setattr(reconnecting_link, "DIAL_TIMEOUT_S", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(TransportError, match="no answer"):
                await connect_url(f"{self.scheme}://127.0.0.1:{port}")


class ByHandContract:
    """What people publish with tools of their own.

    Fixtures ``connect_topic`` and ``by_hand``, an async function that publishes a body on a topic.
    """

    async def test_a_plain_publish_is_heard(
        self, connect_topic: ConnectUrl, by_hand: PublishByHand
    ) -> None:
        """``TOPIC BODY`` reaches fan-out and the untagged, ``TOPIC.42 BODY`` its shard."""
        transport = await connect_topic("by-hand")
        _, everything = await subscribe_live(transport, Feed.ALL)
        _, untagged = await subscribe_live(transport, Feed.UNTAGGED)
        _, tagged = await subscribe_live(transport, 42)
        await by_hand("by-hand", b'{"recipient":"a"}')
        await by_hand("by-hand.42", b'{"recipient":"b"}')
        await everything.wait_for(lambda heard: len(heard.payloads) == 2)
        await prove_live(transport, untagged)
        await prove_live(transport, tagged, 42)
        assert untagged.payloads == [b'{"recipient":"a"}']
        assert tagged.payloads == [b'{"recipient":"b"}']

    async def test_a_bad_signal_leaves_the_gateway_listening(
        self, connect_topic: ConnectUrl, by_hand: PublishByHand
    ) -> None:
        """Signals that break the decoder or the hash are counted and dropped, tagged or not."""
        config = GatewayConfig(
            instance="bad-signals", max_sessions_per_recipient=1, verify_every_s=60
        )
        transport = await connect_topic("bad-signals")
        gateway = Gateway(config, transport, TokenVerifier(secret="0" * 32))
        await gateway.start()
        await wait_until(lambda: gateway.subscriptions.trouble is None)
        counters = gateway.bridge.counters
        for body in BAD_SIGNALS:
            for topic in ("bad-signals", "bad-signals.69"):
                for _ in range(SAMPLE_EVERY):
                    await by_hand(topic, body)
        sent = 2 * SAMPLE_EVERY * len(BAD_SIGNALS)
        await wait_until(lambda: counters.malformed == sent)
        assert gateway.subscriptions.trouble is None
        assert gateway.subscriptions.gaps == 0
        await gateway.close()


class PermissionContract:
    """What a user may not do.

    Fixtures ``restricted``, a transport whose user may publish on the topic and on shard 7's, and
    listen to both; ``take_away`` and ``give_back``, async functions that change whether it may
    listen to the latter.
    """

    async def test_permissions_are_kept_apart(self, restricted: Transport) -> None:
        """A forbidden operation raises, and permitted ones still work."""
        _, receiver = await subscribe_live(restricted, 7)
        for selection in (8, Feed.ALL):
            with pytest.raises(TransportError, match="permission"):
                await restricted.subscribe(selection, RecordingReceiver())
        with pytest.raises(TransportError, match="permission") as caught:
            await restricted.publish([Signal(b"{}", 7), Signal(b'{"recipient":"private"}', 8)])
        assert "private" not in str(caught.value)
        await assert_hears(restricted, receiver, 7)
        assert receiver.gaps == []

    async def test_a_permission_that_is_taken_away_costs_nothing_else(
        self,
        restricted: Transport,
        take_away: Callable[[], Awaitable[None]],
        give_back: Callable[[], Awaitable[None]],
    ) -> None:
        """Other subscriptions deliver, publishing works, and with the permission comes a gap."""
        subscription, receiver = await subscribe_live(restricted, 7)
        _, other = await subscribe_live(restricted, Feed.UNTAGGED)
        await take_away()
        assert isinstance(subscription, Explains)
        await wait_until(lambda: "permission" in (subscription.trouble or ""))
        await other.wait_for(lambda heard: bool(heard.gaps))
        await assert_hears(restricted, other, None)
        assert receiver.gaps == []
        await give_back()
        await receiver.wait_for(lambda heard: bool(heard.gaps))
        await assert_hears(restricted, receiver, 7)
        assert subscription.trouble is None
        assert len(other.gaps) == 1


class TlsContract:
    """TLS by the URL's scheme. Fixtures ``connect_url``, ``certificates`` and ``tls_server``."""

    async def test_a_certificate_that_we_trust(
        self, tls_server: TlsServer, connect_url: ConnectUrl, certificates: Certificates
    ) -> None:
        """With the authority's file it works; without it the certificate is refused."""
        async with tls_server() as url:
            transport = await connect_url(f"{url}?ca_file={certificates.ca_file}")
            await subscribe_live(transport, Feed.ALL)
            with pytest.raises(TransportError, match="certificate verify failed"):
                await connect_url(url)
            await transport.close()

    async def test_a_certificate_of_ours(
        self, tls_server: TlsServer, connect_url: ConnectUrl, certificates: Certificates
    ) -> None:
        """A server that asks for a client certificate gets it."""
        trust = f"?ca_file={certificates.ca_file}"
        ours = f"&cert_file={certificates.cert_file}&key_file={certificates.key_file}"
        async with tls_server(ask=True) as url:
            with pytest.raises(TransportError):
                await connect_url(url + trust)
            transport = await connect_url(url + trust + ours)
            await subscribe_live(transport, Feed.ALL)
            await transport.close()
