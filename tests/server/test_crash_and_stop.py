"""A real instance that is killed, and one that is asked to stop."""

import asyncio
import contextlib
import json
import time

import httpx
import pytest
import websockets

from tests.support.serving import Instance, Serve
from tests.support.waiting import wait_until

SECONDS_OF_LOAD = 2.0
CLIENTS = 8


async def pull_all(instance: Instance, recipient: str, after: int) -> list[tuple[int, str]]:
    """Everything above ``after``, page by page: (version, id)."""
    found: list[tuple[int, str]] = []
    async with instance.async_http(recipient) as http:
        while True:
            answer = await http.get("/v1/messages", params={"after": after, "limit": 500})
            page = answer.raise_for_status().json()
            found += [(message["version"], message["id"]) for message in page["messages"]]
            after = page["version"]
            if not page["more"]:
                return found


class Puller:
    """A client that sleeps, and pulls when it hears ``ready`` or a poke; it reconnects for ever."""

    def __init__(self, instance: Instance, recipient: str) -> None:
        self.instance = instance
        self.recipient = recipient
        self.got: list[tuple[int, str]] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(
                OSError, websockets.WebSocketException, httpx.HTTPError, EOFError
            ):
                socket = await websockets.connect(
                    self.instance.ws_url, additional_headers=self.instance.headers(self.recipient)
                )
                try:
                    async for _ in socket:
                        cursor = self.got[-1][0] if self.got else 0
                        self.got += await pull_all(self.instance, self.recipient, cursor)
                finally:
                    socket.transport.abort()  # a close that is cancelled would leave it open
            await asyncio.sleep(0.05)


async def send_until_dead(
    instance: Instance, recipient: str, accepted: dict[str, list[str]]
) -> None:
    """Send messages one after another, noting each that is answered 202, until the server dies."""
    number = 0
    async with instance.async_http("urn:backend", "send") as http:
        with contextlib.suppress(httpx.HTTPError):
            while True:
                body = {"recipient": recipient, "body": number, "id": f"{recipient}-{number}"}
                answer = await http.post("/v1/messages", json=body)
                assert answer.status_code == 202
                accepted[recipient].append(body["id"])  # type: ignore[arg-type]
                number += 1


async def test_kill_9_loses_nothing_that_was_answered_202(serve: Serve) -> None:
    """Killed under load and restarted: all that was accepted is there, and its clients pull it."""
    instance = await asyncio.to_thread(serve)
    recipients = [f"urn:user:{number}" for number in range(CLIENTS)]
    accepted: dict[str, list[str]] = {recipient: [] for recipient in recipients}
    pullers = [Puller(instance, recipient) for recipient in recipients]
    async with asyncio.TaskGroup() as group:
        listening = [group.create_task(puller.run()) for puller in pullers]
        senders = [
            group.create_task(send_until_dead(instance, recipient, accepted))
            for recipient in recipients
        ]
        until = time.monotonic() + SECONDS_OF_LOAD
        await wait_until(lambda: time.monotonic() > until and all(accepted.values()), 30)
        await asyncio.to_thread(instance.kill)
        await asyncio.gather(*senders)
        await asyncio.to_thread(instance.start)

        def all_pulled() -> bool:
            return all(
                set(accepted[puller.recipient]) <= {message_id for _, message_id in puller.got}
                for puller in pullers
            )

        await wait_until(all_pulled, 20, "every client having pulled all that was accepted")
        for task in listening:
            task.cancel()
    for puller in pullers:
        versions = [version for version, _ in puller.got]
        assert versions == list(range(1, len(versions) + 1)), "in order, without a hole"
        stored = await pull_all(instance, puller.recipient, 0)
        assert [message_id for _, message_id in stored][: len(accepted[puller.recipient])] == (
            accepted[puller.recipient]
        )


async def test_sigterm_drains_and_exits_0(serve: Serve) -> None:
    """SIGTERM: new sessions are refused, those there are close 1012 spread out, pulls go on."""
    instance = await asyncio.to_thread(serve, drain_s=1.5, mailbox="memory://")
    codes: list[tuple[float, int | None]] = []

    async def listen(number: int, ready: asyncio.Event) -> None:
        async with websockets.connect(
            instance.ws_url, additional_headers=instance.headers(f"urn:user:{number}")
        ) as socket:
            assert json.loads(await socket.recv())["type"] == "ready"
            ready.set()
            await socket.wait_closed()
            codes.append((time.monotonic(), socket.close_code))

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        events = [asyncio.Event() for _ in range(10)]
        for number, event in enumerate(events):
            group.create_task(listen(number, event))
        for event in events:
            await event.wait()
        stopping = group.create_task(asyncio.to_thread(instance.terminate))
        await wait_until(lambda: codes)
        async with instance.async_http("urn:user:1") as http:
            assert (await http.get("/v1/messages")).status_code == 200
            answer = await http.get("/readyz")
            assert answer.status_code == 503
            assert "draining" in answer.text
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(
                instance.ws_url, additional_headers=instance.headers("urn:user:late")
            )
        assert refused.value.response.status_code == 503
    assert stopping.result() == 0
    assert {code for _, code in codes} == {1012}
    times = [at for at, _ in codes]
    assert max(times) - min(times) > 1.0
