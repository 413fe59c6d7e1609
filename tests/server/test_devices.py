"""Which devices a message waits for, on a real instance."""

import asyncio
import json
from pathlib import Path

import websockets

from pokebridge.mailbox.base import MAX_DEVICES
from tests.support import Serve, wait_until
from tests.support.silence import Silence

BOB = "urn:user:bob"


async def test_a_device_is_known_from_its_first_ready(serve: Serve) -> None:
    """A connected phone that has pulled nothing yet holds messages back; one without a name not."""
    instance = serve(mailbox="memory://")
    headers = instance.headers(BOB)
    url = instance.ws_url
    async with (
        websockets.connect(f"{url}?device=phone", additional_headers=headers) as phone,
        websockets.connect(url, additional_headers=headers) as nameless,
        instance.async_http("urn:user:alice", "send") as alice,
        instance.async_http(BOB) as bob,
    ):
        for socket in (phone, nameless):
            assert json.loads(await socket.recv())["type"] == "ready"

        async def is_held_back() -> bool:
            """Whether what the laptop has acked is kept for another device."""
            sent = await alice.post("/v1/messages", json={"recipient": BOB, "body": "hello"})
            version = sent.json()["version"]
            await bob.post("/v1/messages/ack", json={"version": version, "device": "laptop"})
            page = await bob.get("/v1/messages", params={"after": version - 1})
            return bool(page.json()["messages"])

        await wait_until(is_held_back, what="the phone being waited for")
        await bob.post("/v1/messages/ack", json={"version": 1_000_000, "device": "phone"})
        page = await bob.get("/v1/messages", params={"after": 0})
        assert page.json()["messages"] == []


async def test_made_up_devices_hold_nobody_up(
    serve: Serve, tmp_path: Path, silence: Silence
) -> None:
    """Bob invents twice as many devices as are remembered, and no other call waits."""
    instance = await asyncio.to_thread(serve, mailbox=f"sqlite:///{tmp_path}/mailbox.db")
    async with (
        instance.async_http("urn:user:alice", "send") as alice,
        instance.async_http(BOB) as bob,
        instance.async_http("urn:admin", "admin") as admin,
    ):

        async def make_up(first: int) -> None:
            for number in range(first, 2 * MAX_DEVICES, 4):
                device = f"device-{number}"
                await bob.get("/v1/messages", params={"after": 0, "device": device})

        making = [asyncio.create_task(make_up(first)) for first in range(4)]
        while not all(task.done() for task in making):
            sent = silence("200 devices of one recipient are made up: a send to another")
            answer = await alice.post("/v1/messages", json={"recipient": "urn:user:eve", "body": 1})
            assert answer.status_code == 202, answer.text
            sent()
        await asyncio.gather(*making)
        assert (await admin.get("/v1/mailbox")).json()["devices"] <= MAX_DEVICES
