"""The test server as a server: its port, its life, and the faults it makes on demand."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from grpc import StatusCode

from pokebridge.testing.pubsub import PubSubServer
from tests.support import free_port

TOPIC = "projects/p/topics/top"
SUBSCRIPTION = "projects/p/subscriptions/sub"


@pytest.fixture
async def server() -> AsyncIterator[PubSubServer]:
    """A server on a free port."""
    async with PubSubServer() as server:
        yield server


@pytest.fixture
async def channel(server: PubSubServer) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to it."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def publisher(channel: grpc.aio.Channel) -> PublisherAsyncClient:
    """Google's client for topics."""
    return PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))


@pytest.fixture
def subscriber(channel: grpc.aio.Channel) -> SubscriberAsyncClient:
    """Google's client for subscriptions."""
    return SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))


async def stream(subscriber: SubscriberAsyncClient) -> list[Any]:
    """Open a stream, and read it to its end."""

    async def requests() -> AsyncIterator[Any]:
        yield {"subscription": SUBSCRIPTION, "stream_ack_deadline_seconds": 10}
        await asyncio.Event().wait()

    responses = await subscriber.streaming_pull(requests=requests())
    return [response async for response in responses]


async def test_denied_methods_fail_until_allowed(
    server: PubSubServer, publisher: PublisherAsyncClient
) -> None:
    """PERMISSION_DENIED for those named and no others."""
    server.deny("CreateTopic")
    with pytest.raises(exceptions.PermissionDenied):
        await publisher.create_topic(name=TOPIC)
    with pytest.raises(exceptions.NotFound):
        await publisher.get_topic(topic=TOPIC)
    server.allow("CreateTopic")
    await publisher.create_topic(name=TOPIC)
    assert server.calls["CreateTopic"] == 2


async def test_failures_are_used_up(server: PubSubServer, publisher: PublisherAsyncClient) -> None:
    """Each fails one call, in their order, and then the method works."""
    server.fail("CreateTopic", StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(exceptions.ServiceUnavailable):
        await publisher.create_topic(name=TOPIC, retry=None)
    with pytest.raises(exceptions.ResourceExhausted):
        await publisher.create_topic(name=TOPIC, retry=None)
    await publisher.create_topic(name=TOPIC)


async def test_streams_break_on_demand(
    server: PubSubServer, publisher: PublisherAsyncClient, subscriber: SubscriberAsyncClient
) -> None:
    """Open streams end with the status asked for; the subscription stays."""
    await publisher.create_topic(name=TOPIC)
    await subscriber.create_subscription(name=SUBSCRIPTION, topic=TOPIC)
    reading = asyncio.create_task(stream(subscriber))
    async with asyncio.timeout(10):
        while not reading.done():
            server.break_streams()
            await asyncio.sleep(0.01)
    with pytest.raises(exceptions.ServiceUnavailable):
        await reading
    await subscriber.get_subscription(subscription=SUBSCRIPTION)


async def test_a_stopped_server_remembers_and_a_new_one_does_not(
    server: PubSubServer, publisher: PublisherAsyncClient
) -> None:
    """Started again on its port it has its topics; another server there has none."""
    await publisher.create_topic(name=TOPIC)
    port = int(server.address.rpartition(":")[2])
    await server.stop()
    await server.stop()
    await server.start()
    assert int(server.address.rpartition(":")[2]) == port
    async with grpc.aio.insecure_channel(server.address) as channel:
        again = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        await again.get_topic(topic=TOPIC)
    await server.stop()
    new = PubSubServer()
    await new.start(port)
    async with grpc.aio.insecure_channel(new.address) as channel:
        again = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        with pytest.raises(exceptions.NotFound):
            await again.get_topic(topic=TOPIC)
    await new.stop()


async def test_a_taken_port_is_an_error(server: PubSubServer) -> None:
    """A second server never shares a port in silence."""
    with pytest.raises(OSError, match="taken"):
        await PubSubServer().start(int(server.address.rpartition(":")[2]))


async def test_it_runs_as_a_program() -> None:
    """``python -m pokebridge.testing.pubsub`` says how to reach it, serves, and stops clean."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pokebridge.testing.pubsub",
        f"--port={port}",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        assert line.decode() == f"export PUBSUB_EMULATOR_HOST=127.0.0.1:{port}\n"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            client = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
            await client.create_topic(name=TOPIC)
        process.send_signal(2)
        async with asyncio.timeout(10):
            _, errors = await process.communicate()
        assert (process.returncode, errors) == (0, b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_only_its_projects_exist() -> None:
    """A server that was given projects knows no other, and says so as Google does."""
    async with (
        PubSubServer(projects={"p"}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        client = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        await client.create_topic(name=TOPIC)
        elsewhere = TOPIC.replace("/p/", "/q/")
        for call in (client.create_topic(name=elsewhere), client.get_topic(topic=elsewhere)):
            with pytest.raises(exceptions.NotFound, match=r"project not found.*project=q"):
                await call
