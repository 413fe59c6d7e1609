"""A group on a real instance: more sessions than a user has, and a mailbox for all readers."""

import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import websockets

from tests.support import Instance, Serve

ROOM = "urn:room:7"
MEMBERS = 5


async def pulled(instance: Instance) -> list[int]:
    """The versions that a reader of the room pulls."""
    async with instance.async_http(ROOM) as http:
        answer = await http.get("/v1/messages")
        return [each["version"] for each in answer.json()["messages"]]


async def test_a_room(serve: Serve) -> None:
    """All members get the poke and pull the message, also after others have acked it."""
    instance = await asyncio.to_thread(
        lambda: serve(group_prefixes="urn:room:", max_sessions_per_recipient=2)
    )
    headers = {"Authorization": f"Bearer {instance.token(ROOM)}"}
    async with AsyncExitStack() as opened, instance.async_http("urn:user:eve", "send") as eve:
        sockets = [
            await opened.enter_async_context(
                websockets.connect(instance.ws_url, additional_headers=headers)
            )
            for _ in range(MEMBERS)
        ]
        for socket in sockets:
            assert json.loads(await socket.recv())["type"] == "ready"
        sent = await eve.post("/v1/messages", json={"recipient": ROOM, "body": "hello"})
        assert sent.status_code == httpx.codes.ACCEPTED
        for number, socket in enumerate(sockets):
            assert json.loads(await socket.recv()) == {"type": "poke", "version": 1}
            assert await pulled(instance) == [1]
            await socket.send('{"type":"ack","version":1}')
            async with instance.async_http(ROOM) as http:
                answer = await http.post(f"/v1/messages/ack?device={number}", json={"version": 1})
                assert answer.status_code == httpx.codes.NO_CONTENT
            await socket.send('{"type":"ping"}')
            assert json.loads(await socket.recv()) == {"type": "pong"}
