"""Clients that others wrote, against a real instance."""

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import websocket
import websockets

from tests.support.missing import missing, require
from tests.support.serving import Instance, Serve

BOB = "urn:user:bob"
TIMEOUT_S = 60
NODE = Path(__file__).parents[1] / "node"


async def poke_bob(instance: Instance) -> None:
    """Poke bob as a backend would, over HTTP."""
    async with instance.async_http("urn:backend", "poke") as http:
        answer = await http.post("/v1/pokes", json={"recipient": BOB})
        assert answer.status_code == 202
        assert answer.json() == {"accepted": 1}


async def test_python_websockets(serve: Serve) -> None:
    """The `websockets` library, with its own pings and a token in the header."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    async with (
        asyncio.timeout(TIMEOUT_S),
        websockets.connect(
            instance.ws_url,
            additional_headers=instance.headers(BOB),
            subprotocols=[websockets.Subprotocol("pokebridge.v1")],
        ) as socket,
    ):
        assert socket.subprotocol == "pokebridge.v1"
        ready = json.loads(await socket.recv())
        assert ready["type"] == "ready"
        await (await socket.ping())
        await poke_bob(instance)
        assert json.loads(await socket.recv()) == {"type": "poke"}
        await socket.send('{"type":"ping"}')
        assert json.loads(await socket.recv()) == {"type": "pong"}
        await socket.send("what?")
        await socket.wait_closed()
        assert socket.close_code == 1008


async def test_aiohttp(serve: Serve) -> None:
    """Aiohttp's client, offering compression (which is declined), with the token in the query."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    async with (
        asyncio.timeout(TIMEOUT_S),
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"{instance.url}/v1/connect?access_token={instance.token(BOB)}", compress=15
        ) as socket,
    ):
        assert (await socket.receive_json())["type"] == "ready"
        await poke_bob(instance)
        assert await socket.receive_json() == {"type": "poke"}
        await socket.send_bytes(b"binary")
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert message.data == 1003


async def test_websocket_client(serve: Serve) -> None:
    """`websocket-client` sends the Origin of its URL, which no setting has to allow."""
    instance = await asyncio.to_thread(serve, dev=False, mailbox="memory://")

    def listen() -> None:
        opened = websocket.create_connection(
            instance.ws_url, TIMEOUT_S, header=instance.headers(BOB)
        )
        with contextlib.closing(opened) as socket:
            assert json.loads(socket.recv())["type"] == "ready"
            asyncio.run(poke_bob(instance))
            assert json.loads(socket.recv()) == {"type": "poke"}

    await asyncio.to_thread(listen)


@pytest.mark.parametrize("framing", ["Expect: 100-continue", "Transfer-Encoding: chunked"])
async def test_curl_offers_http_2(serve: Serve, framing: str) -> None:
    """`curl --http2` asks for an upgrade to h2c, and is served over HTTP/1.1, body and all."""
    curl = require("curl")
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    token = instance.token(BOB, "send")
    message = json.dumps({"recipient": BOB, "body": "\u00e9" * 5_000})
    process = await asyncio.create_subprocess_exec(
        *(curl, "--http2", "--silent", "--noproxy", "*", "--max-time", str(TIMEOUT_S)),
        *("--write-out", "%{http_version} %{http_code}", "--output", "/dev/null"),
        *("--header", f"Authorization: Bearer {token}", "--header", framing),
        *("--header", "Content-Type: application/json", "--data-binary", "@-"),
        f"{instance.url}/v1/messages",
        stdin=PIPE,
        stdout=PIPE,
    )
    said, _ = await process.communicate(message.encode())
    assert said == b"1.1 202"
    async with instance.async_http(BOB) as http:
        (sent,) = (await http.get("/v1/messages")).json()["messages"]
        assert sent["body"] == "\u00e9" * 5_000


async def test_node_ws(serve: Serve) -> None:
    """Node's `ws`, with the token as a sub-protocol, as a browser brings it."""
    node = require("node")
    if not (NODE / "node_modules" / "ws").is_dir():
        missing("npm's ws in tests/node (npm ci)")
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    process = await asyncio.create_subprocess_exec(
        node, "listen.mjs", instance.ws_url, instance.token(BOB), cwd=NODE, stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None

    async def line() -> Any:
        assert process.stdout is not None
        return json.loads(await process.stdout.readline())

    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert await line() == {"type": "open", "protocol": "pokebridge.v1"}
            assert (await line())["type"] == "ready"
            await poke_bob(instance)
            assert await line() == {"type": "poke"}
            process.stdin.write(b'{"type":"ping"}\n')
            assert await line() == {"type": "pong"}
            process.stdin.write(b"[]\n")
            assert await line() == {"type": "close", "code": 1008}
    finally:
        process.kill()
        await process.wait()
