"""Runs clients of whichever ``pokebridge`` it finds, and prints a JSON line for each message.

The argument is a JSON list of clients, each with the ``url``, ``token``, ``device`` and ``policy``
to use. One of this release may ``listen``, with the token of each recipient. The first line that is
printed says which ``pokebridge`` it is.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pokebridge
from pokebridge.client import PokeClient, Policy, ReceivedMessage


def _tell(line: Any) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201 - the test reads it


async def _main(clients: list[dict[str, Any]]) -> None:
    async with AsyncExitStack() as stack:
        for client in clients:

            async def show(
                messages: Sequence[ReceivedMessage], device: str = client["device"]
            ) -> None:
                for message in messages:
                    _tell({"device": device, "body": message.body})

            its = await stack.enter_async_context(
                PokeClient(
                    client["url"],
                    client["token"],
                    show,
                    device=client["device"],
                    policy=Policy(**client["policy"]),
                )
            )
            for recipient, token in client.get("listen", {}).items():
                its.listen(recipient, token, show)
        await asyncio.Event().wait()


_tell({"package": pokebridge.__file__})
asyncio.run(_main(json.loads(sys.argv[1])))
