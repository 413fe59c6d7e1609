"""The examples whose data is the app's own: the real apps, beside a bridge without a mailbox."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.support import Daemon, Instance, Serve, free_port, wait_until

from pokebridge.client import PokeClient

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 40.0


@pytest.fixture
def bridge(serve: Serve) -> Instance:
    """An instance that keeps no messages."""
    return serve("--no-mailbox")


@contextmanager
def _app(example: str, bridge: Instance, directory: Path) -> Iterator[Daemon]:
    port = free_port()
    app_dir = str(EXAMPLES / example)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", app_dir, "app:app"]
    env = os.environ | {"BRIDGE_URL": bridge.url, "NOTES_DB": str(directory / "notes.db")}
    app = Daemon(
        f"{example}-app",
        [*command, "--port", str(port)],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=directory,
        env=env,
    )
    app.start()
    try:
        yield app
    finally:
        app.kill()


async def test_an_apps_own_table(bridge: Instance, tmp_path: Path) -> None:
    """A note that is added shows up in the watching client, also after the bridge was away."""
    bob = "urn:user:bob"
    with _app("own-table", bridge, tmp_path) as app:
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


async def test_replicache_style_pull(bridge: Instance, tmp_path: Path) -> None:
    """A push pokes whoever looks at the list; pulls by cookie bring each change once."""
    with _app("replicache", bridge, tmp_path) as app:
        async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(base_url=app.url) as http:
            patches: list[object] = []

            async def pull(cookie: int) -> int:
                answer = (await http.post("/replicache/pull", json={"cookie": cookie})).json()
                patches.extend(answer["patch"])
                return int(answer["cookie"])

            token = bridge.token("urn:space:todos")
            async with PokeClient(bridge.url, token, on_poke=pull) as client:
                await client.wait_ready(10)
                todo = {"id": "a", "text": "sleep"}
                created = {"id": 1, "name": "createTodo", "args": todo, "clientID": "c1"}
                deleted = {"id": 2, "name": "deleteTodo", "args": {"id": "a"}, "clientID": "c1"}
                for mutations in ([created], [created], [deleted]):
                    pushed = await http.post("/replicache/push", json={"mutations": mutations})
                    assert pushed.status_code == 200
                    await wait_until(lambda: len(patches) >= 1)
                await wait_until(lambda: {"op": "del", "key": "todo/a"} in patches)
            assert patches[0] in (
                {"op": "put", "key": "todo/a", "value": todo},
                {"op": "del", "key": "todo/a"},
            )
            assert len(patches) <= 2
