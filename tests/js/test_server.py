"""``@pokebridge/client/server``: a backend in Node, against a real instance."""

import asyncio
import json
import os
import shutil
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.js.driving import HERE
from tests.support import Serve
from tests.support.missing import require

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_backend_in_node(serve: Serve, client_package: Path, tmp_path: Path) -> None:
    """It sends, pokes and disconnects; each message is committed once, whatever got lost."""
    instance = serve()
    modules = tmp_path / "node_modules" / "@pokebridge"
    modules.mkdir(parents=True)
    (modules / "client").symlink_to(client_package)
    script = shutil.copy(HERE / "server.mjs", tmp_path)
    token = instance.token("urn:service:shop", "send poke admin")
    env = os.environ | {"BRIDGE": instance.url, "TOKEN": token}
    process = await asyncio.create_subprocess_exec(require("node"), script, stdout=PIPE, env=env)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    told = json.loads(printed)
    assert told["receipt"]["version"] == 1
    assert told["receipt"]["duplicate"], "the first attempt had committed it"
    assert (told["ids"], told["attempts"]) == (1, 3)
    assert told["first"] == {"id": "order-7", "version": 2, "duplicate": False}
    assert told["second"] == told["first"] | {"duplicate": True}
    is_http_error, status, message = told["refused"]
    assert (is_http_error, status) == (True, 401)
    assert message.startswith(f"{instance.url}/v1/messages answered 401: ")
    assert told["invalid"] == 422
    assert told["dead"].startswith("http://127.0.0.1:9/v1/pokes can't be reached: ")
    assert all(each.startswith("TypeError: `") for each in told["withSecrets"])
    assert not any("cret" in each for each in told["withSecrets"])
    assert "more than" in told["endless"], "what stands between may send without end"
    assert told["cjs"] == "function"
    with instance.http("urn:user:bob") as http:
        assert [each["body"]["text"] for each in http.get("/v1/messages").json()["messages"]] == [
            "hello",
            "again",
        ]
        metrics = http.get("/metrics").text
    assert "\npokebridge_pokes_total 1503.0\n" in metrics  # 2 messages and 1,501 pokes
