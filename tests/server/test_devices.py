"""Which devices a message waits for, on a real instance."""

import json

import websockets

from tests.support import Serve, wait_until

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
