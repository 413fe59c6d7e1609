"""The example with a table of its own: the real app, beside a bridge without a mailbox."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.examples.apps import EXAMPLES, run_app
from tests.support import Serve, wait_until

TIMEOUT_S = 120.0


async def test_an_apps_own_table(serve: Serve, tmp_path: Path) -> None:
    """A note that is added shows up in the watching client, also after the bridge was away."""
    bob, bridge = "urn:user:bob", serve("--no-mailbox")
    await asyncio.to_thread(bridge.kill)  # the app and the client wait for it
    with run_app("own-table", bridge, tmp_path) as app:
        watcher = await asyncio.create_subprocess_exec(
            sys.executable,
            str(EXAMPLES / "own-table" / "watch.py"),
            bob,
            env=os.environ | {"BRIDGE_URL": bridge.url, "APP_URL": app.url},
            stdout=subprocess.PIPE,
        )
        assert watcher.stdout is not None
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                httpx.AsyncClient(base_url=app.url) as http,
                bridge.async_http() as api,
            ):
                await http.post("/notes", json={"owner": bob, "text": "before it connects"})
                await asyncio.to_thread(bridge.start)
                assert await watcher.stdout.readline() == b"1 before it connects\n"

                async def is_connected() -> bool:
                    return "\npokebridge_sessions 1.0" in (await api.get("/metrics")).text

                await wait_until(is_connected)
                await http.post("/notes", json={"owner": bob, "text": "while it sleeps"})
                assert await watcher.stdout.readline() == b"2 while it sleeps\n"
                await asyncio.to_thread(bridge.kill)
                added = await http.post("/notes", json={"owner": bob, "text": "the bridge is away"})
                assert added.status_code == 201
                await asyncio.to_thread(bridge.start)
                assert await watcher.stdout.readline() == b"3 the bridge is away\n"
        finally:
            watcher.kill()
            await watcher.wait()
