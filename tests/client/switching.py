"""A client that changes its transport a hundred times, while its bridge comes and goes."""

import asyncio
from collections.abc import Awaitable, Callable

from pokebridge.publisher import HttpPublisher
from tests.client.middlebox import Middlebox
from tests.support.serving import Instance

SWITCHES = 100


async def switch_under_traffic(
    instance: Instance,
    box: Middlebox,
    recipient: str,
    until_it_polls: Callable[[bool], Awaitable[object]],
) -> int:
    """Let sockets pass and refuse them in turn, and send meanwhile: numbers from 0 on.

    Every twentieth time the instance is killed before it is reached in the new way, and every
    twentieth time it is drained. ``until_it_polls`` returns when the client is connected in the
    way that it is given. Returns how many messages were sent.
    """
    sent = 0

    async def send() -> None:
        nonlocal sent
        token = instance.token("urn:backend", "send")
        async with HttpPublisher(instance.url, token) as publisher:
            while not done.is_set():
                await publisher.send(recipient, sent, timeout_s=120)
                sent += 1
                await asyncio.sleep(0.005)

    done = asyncio.Event()
    sending = asyncio.create_task(send())
    try:
        for number in range(SWITCHES):
            polls = number % 2 == 0
            box.mode = "refuse" if polls else "pass"
            if polls:
                box.cut()
            if number % 20 == 3:
                await asyncio.to_thread(instance.kill)
                await asyncio.to_thread(instance.start)
            if number % 20 == 12:
                await asyncio.to_thread(instance.restart)
            await until_it_polls(polls)
    finally:
        done.set()
        await sending
    return sent
