"""How others publish signals: by their own clients and tools, without a line of pokebridge."""

import asyncio
import base64
import json
import os
import shutil
import socket
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
from google.cloud.pubsub_v1 import (  # type: ignore[import-untyped]  # ships no types
    PublisherClient,
)
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from grpc import insecure_channel

from tests.cluster.clusters import TOPIC, Cluster
from tests.support.missing import missing, require

NODE = Path(__file__).parents[1] / "node"
SUBJECT = "push-notifications"


class HandMade(NamedTuple):
    """A signal as somebody writes it: a body, and the shard that it is tagged with, if any."""

    body: str
    shard: int | None = None

    @property
    def subject(self) -> str:
        """Where it is published on NATS and Redis."""
        return SUBJECT if self.shard is None else f"{SUBJECT}.{self.shard}"


Publisher = Callable[[Cluster, Sequence[HandMade]], Awaitable[None]]


async def google_python(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """Google's synchronous client for Python."""

    def publish() -> None:
        with insecure_channel(cluster.engine.address) as channel:
            client = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
            topic = client.topic_path(cluster.project, TOPIC)
            futures = [
                client.publish(topic, body.encode(), **_attributes(shard))
                for body, shard in signals
            ]
            for future in futures:
                future.result(timeout=10)
            client.stop()

    await asyncio.to_thread(publish)


async def google_node(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """Google's client for Node."""
    await _node(
        "publish-pubsub.mjs", "@google-cloud/pubsub", (cluster.project, TOPIC), cluster, signals
    )


async def google_http(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """Google's REST API, as with curl."""
    messages = [
        {
            "data": base64.b64encode(body.encode()).decode(),
            "attributes": _attributes(shard),
        }
        for body, shard in signals
    ]
    url = f"{cluster.engine.url}/v1/projects/{cluster.project}/topics/{TOPIC}:publish"
    async with httpx.AsyncClient(trust_env=False) as http:
        (await http.post(url, json={"messages": messages})).raise_for_status()


async def nats_node(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """NATS's own client for Node."""
    await _node(
        "publish-nats.mjs",
        "@nats-io/transport-node",
        (cluster.engine.address, SUBJECT),
        cluster,
        signals,
    )


async def nats_telnet(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """The protocol by hand, as with telnet."""

    def publish() -> None:
        lines = ['CONNECT {"verbose":false}']
        for signal in signals:
            lines += [f"PUB {signal.subject} {len(signal.body.encode())}", signal.body]
        with socket.create_connection(("127.0.0.1", cluster.engine.port), timeout=10) as connection:
            connection.sendall("\r\n".join([*lines, "PING", ""]).encode())
            with connection.makefile() as answers:
                assert "PONG\n" in answers  # reads until it comes

    await asyncio.to_thread(publish)


async def nats_cli(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """The ``nats`` command, where somebody has put it: no package that we know brings it."""
    for signal in signals:
        await _run("nats", "-s", cluster.engine.url, "pub", signal.subject, signal.body)


async def redis_cli(cluster: Cluster, signals: Sequence[HandMade]) -> None:
    """The ``redis-cli`` command; its arguments come as they are, the last one from stdin."""
    command = require("redis-cli")
    for signal in signals:
        at = ("-h", "127.0.0.1", "-p", str(cluster.engine.port))
        await _run(command, *at, "-x", "PUBLISH", signal.subject, stdin=signal.body)


PUBLISHERS: dict[str, Sequence[Publisher]] = {
    "nats": (nats_node, nats_telnet, *([nats_cli] if shutil.which("nats") else [])),
    "valkey": (redis_cli,),
    "pubsub": (google_python, google_node, google_http),
}


async def _node(
    script: str,
    package: str,
    arguments: Sequence[str],
    cluster: Cluster,
    signals: Sequence[HandMade],
) -> None:
    node = require("node")
    if not (NODE / "node_modules" / package).is_dir():
        missing(f"npm's {package} in tests/node (npm ci)")
    lines = "".join(f"{json.dumps(signal._asdict())}\n" for signal in signals)
    env = os.environ | {"PUBSUB_EMULATOR_HOST": cluster.engine.address}
    await _run(node, script, *arguments, stdin=lines, env=env)


async def _run(*command: str, stdin: str = "", env: dict[str, str] | None = None) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=NODE, env=env, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    out, err = await process.communicate(stdin.encode())
    assert process.returncode == 0, (out, err)


def _attributes(shard: int | None) -> dict[str, str]:
    return {} if shard is None else {"shard": str(shard)}
