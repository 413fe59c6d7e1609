"""The commands sessions and disconnect, and the calls behind them, in a cluster of two."""

import asyncio
import json
import re
from typing import Any

import pytest
import websockets

from tests.cli.conftest import Result, Run
from tests.client.between import Between, answer
from tests.support import Serve, free_port, wait_until
from tests.support.daemon import Daemon
from tests.support.serving import JWT_SECRET, Instance

BOB = "urn:user:bob"


@pytest.fixture
def instances(serve: Serve, nats_server: Daemon) -> list[Instance]:
    """Two on NATS, with one mailbox."""
    return [
        serve(
            transport=nats_server.url,
            coordination=nats_server.url,
            cluster="lookup",
            mailbox="sqlite:///shared.db",
            instance=name,
        )
        for name in ("one", "two")
    ]


async def test_a_recipient_is_looked_up_and_disconnected(
    instances: list[Instance], run: Run
) -> None:
    """Any instance shows where Bob is connected, what he was poked for and what he has acked."""
    one, two = instances

    def ask(*args: str) -> Result:
        return run(*args, POKEBRIDGE_URL=one.url, POKEBRIDGE_JWT_SECRET=JWT_SECRET)

    async def state() -> Any:
        return json.loads((await asyncio.to_thread(ask, "sessions", BOB, "--json")).out)

    headers = two.headers(BOB)
    url = f"{two.ws_url}?moved=1&device=phone"
    async with websockets.connect(url, additional_headers=headers) as socket:
        assert json.loads(await socket.recv())["type"] == "ready"
        async with one.async_http("urn:user:alice", "send") as http:
            await http.post("/v1/messages", json={"recipient": BOB, "body": 1})
        async with one.async_http(BOB) as http:
            await http.post("/v1/messages/ack?device=desk", json={"version": 1})
        await socket.recv()  # the poke

        def is_settled(told: Any) -> bool:
            return told["mailbox"]["poke_owed_since_ms"] is None and not told["unanswered"]

        async def is_told() -> bool:
            return is_settled(await state())

        await wait_until(is_told, what="both instances know each other, and the poke is confirmed")
        told = await state()
        (session,) = told["sessions"]
        assert (session["instance"], session["device"], session["told"]) == ("two", "phone", 1)
        assert {each["device"]: each["behind"] for each in told["mailbox"]["devices"]} == {
            "desk": 0,
            "phone": 1,
        }
        text = (await asyncio.to_thread(ask, "sessions", BOB)).out
        assert re.search(
            r"^connected to two\b.*, device phone, for \d+[sm], poked for version 1$",
            text,
            re.MULTILINE,
        )
        assert "device phone: acked 0, 1 behind" in text
        assert (await asyncio.to_thread(ask, "disconnect", BOB)).status == 0
        with pytest.raises(websockets.ConnectionClosed):
            await socket.recv()
        assert socket.close_code == 4401
    assert "not connected" in (await asyncio.to_thread(ask, "sessions", BOB)).out


def test_what_can_not_be_looked_up(ask: Run) -> None:
    """A name that is not a valid recipient is reported in one line."""
    result = ask("sessions", "no recipient")
    assert (result.status, result.out) == (2, "")
    assert "a recipient is" in result.err


@pytest.mark.parametrize(
    ("args", "path", "body"),
    [
        (["sessions", "bob"], "/v1/sessions/bob", '{"sessions":[]}'),
        (
            ["sessions", "bob"],
            "/v1/sessions/bob",
            (
                '{"recipient":"bob","sessions":[{"instance":"a","device":"d","address":"",'
                '"since_ms":1e400,"told":null}],"unanswered":[],"mailbox":null}'
            ),
        ),
        (["sessions", ".."], "/v1/sessions/%2E%2E", '{"sessions":null}'),
        (["cluster", "status"], "/v1/cluster", '{"instances":[5],"traffic":7}'),
        (["poke", "bob"], "/v1/pokes", '{"accepted":"x"}'),
        (["send", "bob", "1"], "/v1/messages", '{"version":1}'),
        (["token", "bob"], "/v1/dev/token", '{"token":5}'),
    ],
)
async def test_json_that_is_not_the_bridges_is_one_line(
    run: Run, args: list[str], path: str, body: str
) -> None:
    """Similar JSON of another server is reported in one line, without a traceback."""
    secret = "" if args[0] == "token" else JWT_SECRET
    async with Between(free_port()).run() as between:
        between.answers[path] = [answer(200, body=body, media_type="application/json")]
        environ = {"POKEBRIDGE_URL": between.url, "POKEBRIDGE_JWT_SECRET": secret}
        result = await asyncio.to_thread(run, *args, **environ)
        assert between.asked == [path]
    assert result.out == ""
    assert "but not as an instance of pokebridge" in result.err
    assert result.err.count("\n") == 1
