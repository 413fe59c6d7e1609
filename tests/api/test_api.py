"""The HTTP API against protocol.md section 4, row by row."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pokebridge.api.app import BODY_CAP_BYTES, create_api
from pokebridge.api.metrics import Value, expose
from pokebridge.asgi import Message
from pokebridge.cluster.node import Home
from pokebridge.mailbox.base import Limits, MailboxStats
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import NewMessage, Poke
from pokebridge.sharding import shard_of
from pokebridge.submission import MAX_BODY_DEPTH
from pokebridge.telemetry import Metric
from pokebridge.testing.mailbox_kit import head
from pokebridge.tokens import Claims, TokenVerifier
from tests.api.api_world import ALICE, BOB, INSTANCE, SECRET, World, bearer, http_client


@pytest.fixture
def world() -> World:
    """What stands behind the API."""
    return World()


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """The API of an instance without ``--dev``."""
    async with http_client(create_api(world.parts())) as client:
        yield client


@pytest.fixture
async def dev_http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """The API of an instance with ``--dev``."""
    async with http_client(create_api(world.dev_parts())) as client:
        yield client


def assert_problem(response: httpx.Response, status: int, word: str) -> None:
    """``response`` is a problem (RFC 9457) with ``status`` whose detail has ``word``."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert word in problem["detail"]


async def send(http: httpx.AsyncClient, body: object, **fields: object) -> httpx.Response:
    """Send from Alice to Bob."""
    message = {"recipient": BOB, "body": body, **fields}
    return await http.post("/v1/messages", json=message, headers=bearer(ALICE, "send"))


async def pull(http: httpx.AsyncClient, **query: int | str) -> dict[str, object]:
    """Pull as Bob."""
    response = await http.get("/v1/messages", params=query, headers=bearer(BOB))
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


class TestWhoMayCall:
    """Identity and scopes come from the bearer token alone."""

    async def test_no_token(self, http: httpx.AsyncClient) -> None:
        """A call without a token is told that it needs one."""
        response = await http.get("/v1/messages")
        assert_problem(response, 401, "Authorization: Bearer")
        assert response.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("value", ["Bearer", "Bearer x.y.z", "Basic YTpi", "x"])
    async def test_bad_token(self, http: httpx.AsyncClient, value: str) -> None:
        """Anything but a valid bearer token is refused."""
        response = await http.get("/v1/messages", headers={"Authorization": value})
        assert_problem(response, 401, "token")
        assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'

    async def test_no_token_in_the_query(self, http: httpx.AsyncClient) -> None:
        """The query's access_token is for WebSockets: URLs end up in logs."""
        token = bearer(BOB)["Authorization"].removeprefix("Bearer ")
        assert_problem(await http.get("/v1/messages", params={"access_token": token}), 401, "token")

    async def test_scheme_in_any_case(self, http: httpx.AsyncClient) -> None:
        """The authentication scheme is case-insensitive (RFC 9110, section 11.1)."""
        token = bearer(BOB)["Authorization"].replace("Bearer", "bearer")
        response = await http.get("/v1/messages", headers={"Authorization": token})
        assert response.status_code == 200

    @pytest.mark.parametrize(
        ("method", "path", "scope"),
        [
            ("POST", "/v1/pokes", "poke"),
            ("POST", "/v1/messages", "send"),
            ("DELETE", "/v1/sessions/bob", "admin"),
            ("GET", "/v1/sessions/bob", "admin"),
            ("GET", "/v1/mailbox", "admin"),
            ("GET", "/v1/cluster", "admin"),
            ("PUT", "/v1/cluster/mode", "admin"),
            ("POST", "/v1/cluster/drain", "admin"),
        ],
    )
    async def test_missing_scope(
        self, http: httpx.AsyncClient, method: str, path: str, scope: str
    ) -> None:
        """A token without the scope, though it has all others, is refused."""
        others = " ".join({"poke", "send", "admin"} - {scope})
        response = await http.request(method, path, headers=bearer(ALICE, others), json={})
        assert_problem(response, 403, scope)
        assert "insufficient_scope" in response.headers["www-authenticate"]

    async def test_keys_unavailable(self, world: World) -> None:
        """While the issuer's keys are unavailable, the caller is told to retry, not to log in."""
        verifier = TokenVerifier(jwks_url="http://127.0.0.1:9/keys")
        parts = replace(world.parts(), verifier=verifier)
        # An ES256 header, the rest invented: the key must be fetched before the token is refused.
        token = "eyJhbGciOiJFUzI1NiJ9.e30.AAAA"
        async with http_client(create_api(parts)) as http:
            response = await http.get("/v1/messages", headers={"Authorization": f"Bearer {token}"})
        await verifier.close()
        assert_problem(response, 503, "keys")
        assert int(response.headers["retry-after"]) > 0


class TestPokes:
    """POST /v1/pokes."""

    async def test_one_and_many(self, http: httpx.AsyncClient, world: World) -> None:
        """A recipient or a list of them is poked, and the answer counts them."""
        headers = bearer("backend", "poke")
        one = await http.post("/v1/pokes", json={"recipient": BOB}, headers=headers)
        assert (one.status_code, one.json()) == (202, {"accepted": 1})
        two = await http.post("/v1/pokes", json={"recipients": [ALICE, BOB]}, headers=headers)
        assert (two.status_code, two.json()) == (202, {"accepted": 2})
        assert world.pokes == [Poke(BOB), Poke(ALICE), Poke(BOB)]

    async def test_largest_request(self, http: httpx.AsyncClient, world: World) -> None:
        """A thousand recipients of 256 characters fit; one more does not."""
        recipients = [f"{number:0>256}" for number in range(1000)]
        headers = bearer("backend", "poke")
        response = await http.post("/v1/pokes", json={"recipients": recipients}, headers=headers)
        assert (response.status_code, len(world.pokes)) == (202, 1000)
        recipients.append("one-more")
        response = await http.post("/v1/pokes", json={"recipients": recipients}, headers=headers)
        assert_problem(response, 422, "1000")

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"recipient": BOB, "recipients": [BOB]},
            {"recipient": ""},
            {"recipient": "x" * 257},
            {"recipient": "b ob"},
            {"recipient": "bob\n"},
            {"recipient": "bób"},
            {"recipients": [BOB, 7]},
            {"recipients": BOB},
            {"recipeint": BOB},
        ],
    )
    async def test_bad_request(
        self, http: httpx.AsyncClient, world: World, body: dict[str, object]
    ) -> None:
        """What names no recipient in the contract's form is refused as a whole."""
        response = await http.post("/v1/pokes", json=body, headers=bearer("backend", "poke"))
        assert_problem(response, 422, "")
        assert world.pokes == []

    async def test_transport_down(self, http: httpx.AsyncClient, world: World) -> None:
        """A transport that does not answer is a 503 that says when to try again."""
        world.transport_is_down = True
        headers = bearer("backend", "poke")
        response = await http.post("/v1/pokes", json={"recipient": BOB}, headers=headers)
        assert_problem(response, 503, "transport")
        assert int(response.headers["retry-after"]) > 0


class TestSend:
    """POST /v1/messages."""

    async def test_sender_is_the_caller(self, http: httpx.AsyncClient) -> None:
        """A message gets the next version and an id, and its sender is the token's subject."""
        first, second = await send(http, {"text": "a"}), await send(http, "b")
        assert [first.status_code, second.status_code] == [202, 202]
        assert [first.json()["version"], second.json()["version"]] == [1, 2]
        assert first.json()["id"] != second.json()["id"]
        messages = (await pull(http))["messages"]
        assert isinstance(messages, list)
        assert [message["sender"] for message in messages] == [ALICE, ALICE]
        assert [message["id"] for message in messages] == [first.json()["id"], second.json()["id"]]

    async def test_same_id_again(self, http: httpx.AsyncClient) -> None:
        """The same id from the same sender is a 200 with the first answer, and no new message."""
        first = await send(http, 1, id="order-1")
        again = await send(http, 2, id="order-1")
        assert (first.status_code, again.status_code) == (202, 200)
        assert again.json() == first.json() == {"id": "order-1", "version": 1}
        assert (await pull(http))["version"] == 1

    @pytest.mark.parametrize(
        "text",
        [
            "null",
            "1.10",
            "-0",
            "1e400",
            "123456789012345678901",
            '{"b" : 1,"a":2, "b":3}',
            '"\\/é"',
        ],
    )
    async def test_body_kept_as_written(self, http: httpx.AsyncClient, text: str) -> None:
        """The body is returned as the text that was sent, with its numbers and spaces unchanged."""
        request = f'{{"recipient":"{BOB}","body":{text}}}'.encode()
        sent = await http.post("/v1/messages", content=request, headers=bearer(ALICE, "send"))
        if text == "1e400":  # it would be unreadable to most parsers
            assert_problem(sent, 422, "range")
            return
        assert sent.status_code == 202, sent.text
        response = await http.get("/v1/messages", headers=bearer(BOB))
        assert f'"body":{text},' in response.text

    async def test_largest_body(self, http: httpx.AsyncClient) -> None:
        """64 KiB of body fit, and one byte more is too large."""
        assert (await send(http, "x" * (65_536 - 2))).status_code == 202
        assert_problem(await send(http, "x" * (65_536 - 1)), 413, "65536")

    async def test_deep_body(self, http: httpx.AsyncClient) -> None:
        """A wide body is accepted. A nesting that could break a reader's parser is refused."""

        def nested(depth: int) -> bytes:
            body = "[" * depth + "]" * depth
            return f'{{"recipient":"{BOB}","body":{body}}}'.encode()

        headers = bearer(ALICE, "send")
        assert (await send(http, [[]] * (MAX_BODY_DEPTH + 1))).status_code == 202
        fits = await http.post("/v1/messages", content=nested(MAX_BODY_DEPTH), headers=headers)
        assert fits.status_code == 202
        for depth in (MAX_BODY_DEPTH + 1, 20_000):
            deep = await http.post("/v1/messages", content=nested(depth), headers=headers)
            assert_problem(deep, 422, "nested")

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"recipient=bob", b'{"recipient":"b","body":"\xff"}', b'{"body":"\\ud800"}'],
    )
    async def test_not_json(self, http: httpx.AsyncClient, content: bytes) -> None:
        """A body that is not JSON, or has a broken string in it, gets 400."""
        headers = bearer(ALICE, "send")
        response = await http.post("/v1/messages", content=content, headers=headers)
        assert_problem(response, 400, "not JSON")

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": ""},
            {"id": "x" * 129},
            {"id": "a b"},
            {"id": 7},
            {"ttl_s": 0},
            {"ttl_s": -1},
            {"ttl_s": 1e12},
            {"ttl_s": "60"},
            {"recipient": "bób"},
            {"ttl": 60},
        ],
    )
    async def test_bad_fields(self, http: httpx.AsyncClient, fields: dict[str, object]) -> None:
        """A field outside the contract is refused, a misspelt one included."""
        assert_problem(await send(http, 1, **fields), 422, "")
        assert (await pull(http))["messages"] == []

    async def test_ttl_passed_on(self, http: httpx.AsyncClient, world: World) -> None:
        """A message with a TTL is committed with it; whole and broken seconds are both fine."""
        assert (await send(http, 1, ttl_s=60)).status_code == 202
        assert (await send(http, 1, ttl_s=0.5)).status_code == 202
        assert await head(world.mailbox, BOB) == 2

    async def test_ephemeral(self, http: httpx.AsyncClient, world: World) -> None:
        """An ephemeral message is there for half a minute at most, whatever its TTL says."""
        now_s = 1_700_000_000.0
        world.mailbox._clock = lambda: now_s
        await send(http, "a", ephemeral=True)
        await send(http, "b", ephemeral=True, ttl_s=3600)
        await send(http, "c", ephemeral=True, ttl_s=5)
        await send(http, "d", ephemeral=False)

        async def bodies() -> list[object]:
            return [message["body"] for message in (await pull(http))["messages"]]  # type: ignore[attr-defined]  # it is JSON

        assert await bodies() == ["a", "b", "c", "d"]
        now_s += 29
        assert await bodies() == ["a", "b", "d"]
        now_s += 1
        assert await bodies() == ["d"]

    async def test_a_full_mailbox_refuses(self, world: World) -> None:
        """The sender is told in plain words, with a status on which no library tries again."""
        world.mailbox = MemoryMailbox(limits=Limits(max_messages=2))
        async with http_client(create_api(world.parts())) as http:
            for number in range(2):
                assert (await send(http, number, id=f"{number}")).status_code == 202
            response = await send(http, 2)
            assert_problem(response, 507, "mailbox is full (2 messages")
            assert "retry-after" not in response.headers
            assert (await send(http, 1, id="1")).status_code == 200
            await http.post("/v1/messages/ack", json={"version": 1}, headers=bearer(BOB))
            assert (await send(http, 2)).json()["version"] == 3

    async def test_mailbox_down(self, http: httpx.AsyncClient, world: World) -> None:
        """A mailbox that can't commit is a 503: nothing was accepted."""
        await world.mailbox.close()
        response = await send(http, 1)
        assert_problem(response, 503, "")
        assert int(response.headers["retry-after"]) > 0


class TestPull:
    """GET /v1/messages."""

    async def test_by_cursor(self, http: httpx.AsyncClient) -> None:
        """Pages come in order; their version is the next cursor, and more tells of the rest."""
        for number in range(3):
            await send(http, number)
        page = await pull(http, limit=2)
        assert [message["body"] for message in page["messages"]] == [0, 1]  # type: ignore[attr-defined]  # it is JSON
        assert (page["version"], page["more"]) == (2, True)
        page = await pull(http, after=2)
        assert [message["version"] for message in page["messages"]] == [3]  # type: ignore[attr-defined]  # it is JSON
        assert (page["version"], page["more"]) == (3, False)
        assert await pull(http, after=3) == {"messages": [], "version": 3, "more": False}

    async def test_large_messages_come_in_several_pages(self, http: httpx.AsyncClient) -> None:
        """A page is bounded in bytes, too. The next page begins where it was cut."""
        for _ in range(40):
            await send(http, "x" * 60_000)
        after = 0
        pages: list[dict[str, Any]] = []
        while not pages or pages[-1]["more"]:
            pages.append(await pull(http, after=after, limit=500))
            after = pages[-1]["version"]
        assert len(pages) == 3
        versions = [message["version"] for page in pages for message in page["messages"]]
        assert versions == list(range(1, 41))

    async def test_empty_mailbox(self, http: httpx.AsyncClient) -> None:
        """A recipient that never got a message is at version 0."""
        assert await pull(http) == {"messages": [], "version": 0, "more": False}

    async def test_sent_at(self, world: World) -> None:
        """The time of the commit is RFC 3339, UTC, to the millisecond."""
        world.mailbox._clock = lambda: 1_700_000_000.007
        async with http_client(create_api(world.parts())) as http:
            await send(http, 1)
            page = await pull(http)
        assert page["messages"][0]["sent_at"] == "2023-11-14T22:13:20.007Z"  # type: ignore[index]  # it is JSON

    async def test_only_ones_own(self, http: httpx.AsyncClient) -> None:
        """The reader is the token's subject, so nobody can pull another user's messages."""
        await send(http, "for bob")
        response = await http.get("/v1/messages?recipient=urn:user:bob", headers=bearer(ALICE))
        assert response.json()["messages"] == []

    @pytest.mark.parametrize(
        ("header", "status"),
        [
            ("TAG", 304),
            ("W/TAG", 304),
            ('"0", W/TAG', 304),
            ("*", 304),
            ('"1"', 200),  # the form of release 0.1.0, which another reader may have left behind
            ('W/"1"', 200),
            ('"0-abc"', 200),
            ("TAGx", 200),
            ('"' + "1" * 30 + '"', 200),
            ("", 200),
        ],
    )
    @pytest.mark.parametrize("after", [0, 1])
    async def test_conditional(
        self, http: httpx.AsyncClient, after: int, header: str, status: int
    ) -> None:
        """A matching If-None-Match, compared weakly, costs no body; any other gets the page."""
        await send(http, 1)
        url = f"/v1/messages?after={after}"
        tag = (await http.get(url, headers=bearer(BOB))).headers["etag"]
        headers = {**bearer(BOB), "If-None-Match": header.replace("TAG", tag)}
        response = await http.get(url, headers=headers)
        assert response.status_code == status
        assert response.headers["etag"] == tag
        if status == 304:
            assert response.content == b""
        else:
            assert len(response.json()["messages"]) == 1 - after
        if header != "*":
            lines = [("If-None-Match", '"another"'), *headers.items()]
            assert (await http.get(url, headers=lines)).status_code == status

    async def test_a_tag_belongs_to_its_reader(self, http: httpx.AsyncClient) -> None:
        """A tag of another reader, or of release 0.1.0, gets no 304, even at the same head."""
        for recipient in (ALICE, BOB):
            body = {"recipient": recipient, "body": recipient}
            await http.post("/v1/messages", json=body, headers=bearer("urn:backend", "send"))
        alices = await http.get("/v1/messages", headers=bearer(ALICE))
        for tag in (alices.headers["etag"], '"1"', f'"1", {alices.headers["etag"]}'):
            response = await http.get("/v1/messages", headers={**bearer(BOB), "If-None-Match": tag})
            assert [each["body"] for each in response.json()["messages"]] == [BOB]

    @pytest.mark.parametrize(
        "path", ["/v1/messages", "/v1/connect-info", "/v1/messages?after=x", "/nothing"]
    )
    async def test_no_cache_keeps_an_answer(self, http: httpx.AsyncClient, path: str) -> None:
        """An answer, or an error, is for its caller only: no cache may store it."""
        for headers in (bearer(BOB), {}):
            response = await http.get(path, headers=headers)
            assert response.headers["cache-control"] == "private, no-store"
        response = await http.get("/v1/messages", headers={**bearer(BOB), "If-None-Match": "*"})
        assert response.status_code == 304
        assert response.headers["cache-control"] == "private, no-store"
        assert "Authorization" in response.headers["vary"]

    @pytest.mark.parametrize(
        "query",
        [
            *("after=-1", "after=x", "after=1.5", f"after={2**53}", "after=" + "9" * 5000),
            *("limit=0", "limit=501", "limit=", "limit=1&limit=1"),
            *("device=", "device=a%20b", "device=" + "x" * 129),
        ],
    )
    async def test_bad_query(self, http: httpx.AsyncClient, query: str) -> None:
        """A query outside the contract is refused, not bent."""
        assert_problem(await http.get(f"/v1/messages?{query}", headers=bearer(BOB)), 422, "")

    async def test_device_becomes_known(self, http: httpx.AsyncClient, world: World) -> None:
        """A device that pulled holds messages back until it acks them too."""
        await send(http, 1)
        await pull(http, device="phone")
        await http.post("/v1/messages/ack?device=tv", json={"version": 1}, headers=bearer(BOB))
        assert (await pull(http))["messages"]
        await http.post("/v1/messages/ack?device=phone", json={"version": 1}, headers=bearer(BOB))
        assert (await pull(http))["messages"] == []

    async def test_device_registered_once(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A device's later pulls cost one read each and no write; the memory of it is bounded."""
        monkeypatch.setattr("pokebridge.mailbox.devices.KNOWN", 2)
        seen: list[str] = []

        class Counting(type(world.mailbox)):  # type: ignore[misc]  # a class made for this test
            async def see_device(self, recipient: str, device: str) -> None:
                seen.append(device)

        parts = replace(world.parts(), mailbox=world.mailbox_side(Counting()))
        async with http_client(create_api(parts)) as http:
            for device in ("a", "b", "a", "c", "a", "b"):
                await pull(http, device=device)
        assert seen == ["a", "b", "c", "b"]


class TestAck:
    """POST /v1/messages/ack."""

    async def test_deletes(self, http: httpx.AsyncClient) -> None:
        """A message that the only device has acked is deleted. The version stays."""
        await send(http, 1)
        await send(http, 2)
        response = await http.post("/v1/messages/ack", json={"version": 1}, headers=bearer(BOB))
        assert (response.status_code, response.content) == (204, b"")
        page = await pull(http)
        assert [message["body"] for message in page["messages"]] == [2]  # type: ignore[attr-defined]  # it is JSON

    async def test_device_in_the_body(self, http: httpx.AsyncClient) -> None:
        """The device may stand in the body as well as in the query."""
        await send(http, 1)
        await pull(http, device="phone")
        ack = {"version": 1, "device": "phone"}
        await http.post("/v1/messages/ack", json=ack, headers=bearer(BOB))
        assert (await pull(http))["messages"] == []

    @pytest.mark.parametrize("version", [-1, 1.5, "1", None, 2**53])
    async def test_bad_version(self, http: httpx.AsyncClient, version: object) -> None:
        """A version is a whole number that JSON carries safely."""
        ack = {"version": version}
        response = await http.post("/v1/messages/ack", json=ack, headers=bearer(BOB))
        assert_problem(response, 422, "version")


class TestSessionsAndCluster:
    """Where to connect, and what an administrator may do."""

    async def test_connect_info(self, http: httpx.AsyncClient, world: World) -> None:
        """A caller learns its shard and where to connect: its owner, or the host that it asked."""
        response = await http.get("/v1/connect-info", headers=bearer(BOB))
        assert response.json() == {
            "url": "ws://a.example:8080/v1/connect",
            "shard": shard_of(BOB, 100),
            "instance": INSTANCE,
        }
        world.home = Home(42, "b", "wss://b.example/v1/connect")
        async with http_client(create_api(world.parts())) as http_of_another:
            response = await http_of_another.get("/v1/connect-info", headers=bearer(BOB))
        assert response.json() == {
            "url": "wss://b.example/v1/connect",
            "shard": 42,
            "instance": "b",
        }

    @pytest.mark.parametrize("host", ["", ":80", "x:99999", "x:0", "[::1"])
    async def test_connect_info_needs_a_host(self, http: httpx.AsyncClient, host: str) -> None:
        """Without a valid Host the instance knows no URL to connect to."""
        response = await http.get("/v1/connect-info", headers=bearer(BOB) | {"Host": host})
        assert response.status_code == 400

    @pytest.mark.parametrize(("trusted", "scheme"), [("127.0.0.0/8", "wss"), ("10.0.0.0/8", "ws")])
    async def test_connect_info_behind_a_proxy(
        self, world: World, trusted: str, scheme: str
    ) -> None:
        """A trusted proxy's word that TLS was spoken to it is believed, a stranger's is not."""
        parts = replace(world.parts(), trusted_proxies=[ip_network(trusted)])
        headers = bearer(BOB) | {"X-Forwarded-Proto": "https"}
        async with http_client(create_api(parts)) as http:
            response = await http.get("/v1/connect-info", headers=headers)
        assert response.json()["url"] == f"{scheme}://a.example:8080/v1/connect"

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    async def test_plain_connect(self, http: httpx.AsyncClient, method: str) -> None:
        """A request that does not upgrade is told to (RFC 9110, section 15.5.22)."""
        response = await http.request(method, "/v1/connect")
        assert response.status_code == 426
        assert response.headers["upgrade"] == "websocket"

    @pytest.mark.parametrize("recipient", [BOB, "a/b?c#d%", "/"])
    async def test_disconnect(self, http: httpx.AsyncClient, world: World, recipient: str) -> None:
        """Any recipient can be named in the path."""
        path = f"/v1/sessions/{quote(recipient, safe='')}"
        response = await http.delete(path, headers=bearer("root", "admin"))
        assert response.status_code == 204
        assert world.disconnected == [recipient]

    async def test_disconnect_nobody(self, http: httpx.AsyncClient, world: World) -> None:
        """A path that names no valid recipient is refused."""
        for path in ("/v1/sessions/", "/v1/sessions/b%C3%B3b"):
            response = await http.delete(path, headers=bearer("root", "admin"))
            assert_problem(response, 422, "recipient")
        assert world.disconnected == []

    async def test_cluster(self, http: httpx.AsyncClient) -> None:
        """The cluster is shown with the contract's names."""
        response = await http.get("/v1/cluster", headers=bearer("root", "admin"))
        view = response.json()
        assert {"name", "mode", "epoch", "shard_count", "instances", "traffic"} <= set(view)
        names = {"id", "url", "version", "state", "sessions", "shards"}
        assert set(view["instances"][0]) >= names
        assert set(view["traffic"]) == {
            "messages_per_s",
            "global_ops_per_s",
            "red_line",
            "noise_ratio",
            "over_red_line",
        }

    async def test_the_mailbox_is_counted(self, world: World) -> None:
        """All that it holds and owes, and calls at one time share one count."""
        await world.mailbox.append(NewMessage(BOB, ALICE, "1", b'{"text": "hello"}'))
        headers = bearer("root", "admin")
        counts = 0
        count = world.mailbox.stats

        async def counted() -> MailboxStats:
            nonlocal counts
            counts += 1
            await asyncio.sleep(0)
            return await count()

        world.mailbox.stats = counted  # type: ignore[method-assign]
        async with http_client(create_api(world.parts())) as http:
            answers = [http.get("/v1/mailbox", headers=headers) for _ in range(3)]
            one, *others = [each.json() for each in await asyncio.gather(*answers)]
        assert counts == 1
        assert others == [one, one]
        assert (one["recipients"], one["messages"], one["bytes"]) == (1, 1, 17)
        assert (one["pokes_owed"], one["poke_owed_since_ms"] is None) == (1, False)

    async def test_mode(self, http: httpx.AsyncClient, world: World) -> None:
        """A migration is asked for by its mode, and by force only when that is said."""
        headers = bearer("root", "admin")
        for body in ({"mode": "partitioned"}, {"mode": "fanout", "force": True}):
            response = await http.put("/v1/cluster/mode", json=body, headers=headers)
            assert response.status_code == 202
        assert world.modes == [("partitioned", False), ("fanout", True)]
        response = await http.put("/v1/cluster/mode", json={"mode": "chaos"}, headers=headers)
        assert_problem(response, 422, "mode")

    async def test_drain(self, http: httpx.AsyncClient, world: World) -> None:
        """The instance that is named drains."""
        headers = bearer("root", "admin")
        response = await http.post("/v1/cluster/drain", json={"instance": "b"}, headers=headers)
        assert (response.status_code, world.drained) == (202, ["b"])

    async def test_without_a_mailbox_there_are_no_messages(self, world: World) -> None:
        """An instance that only bridges pokes, and knows no messages."""
        parts = replace(world.parts(), mailbox=None)
        async with http_client(create_api(parts)) as http:
            for method, path in (
                ("GET", "/v1/messages"),
                ("POST", "/v1/messages"),
                ("POST", "/v1/messages/ack"),
                ("GET", "/v1/mailbox"),
            ):
                response = await http.request(method, path, headers=bearer(BOB, "send admin"))
                assert_problem(response, 404, "")
            poked = {"recipient": BOB}
            response = await http.post("/v1/pokes", json=poked, headers=bearer("root", "poke"))
            assert response.status_code == 202

    async def test_without_the_api_role_there_are_only_operations(self, world: World) -> None:
        """An instance that has other roles still tells how it is, and answers nothing else."""
        parts = replace(world.parts(), has_calls=False)
        async with http_client(create_api(parts)) as http:
            assert (await http.get("/readyz")).status_code == 200
            response = await http.get("/v1/cluster", headers=bearer("root", "admin"))
            assert_problem(response, 404, "")


class TestOperations:
    """What operators and their machines call."""

    async def test_health(self, http: httpx.AsyncClient, world: World) -> None:
        """Liveness says that the process answers, whatever else is wrong."""
        world.not_ready.append("the mailbox does not answer")
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.head("/healthz")).status_code == 200

    async def test_readiness(self, http: httpx.AsyncClient, world: World) -> None:
        """Readiness names every reason why it is not."""
        assert (await http.get("/readyz")).status_code == 200
        world.not_ready += ["no probe came back", "the mailbox does not answer"]
        response = await http.get("/readyz")
        assert_problem(response, 503, "no probe came back; the mailbox does not answer")

    async def test_metrics(self, world: World) -> None:
        """The numbers of the instance and the timings of its requests are read at the scrape."""
        parts = world.parts()
        numbers: dict[Metric, Value] = {
            Metric.SESSIONS: 1,
            Metric.POKES: 2,
            Metric.HANDSHAKES: {("101",): 4, ("401",): 1},
        }
        expose(parts.registry, lambda: numbers)
        async with http_client(create_api(parts)) as http:
            numbers[Metric.POKES] = 3
            await send(http, 1)
            await http.request("MADE-UP", "/v1/no/such/path")
            response = await http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert samples["pokebridge_sessions",] == 1
        assert samples["pokebridge_pokes_total",] == 3
        assert samples["pokebridge_handshakes_total", "401"] == 1
        requests = "pokebridge_http_request_duration_seconds"
        assert samples[f"{requests}_count", "/v1/messages", "202", "POST"] == 1
        assert samples[f"{requests}_bucket", "+Inf", "404", "none", "other"] == 1

    async def test_docs(self, http: httpx.AsyncClient) -> None:
        """The page to try the API is served whole from here, under a strict policy."""
        page = await http.get("/docs")
        assert page.status_code == 200
        assert "script-src 'self';" in page.headers["content-security-policy"]
        for path in ("/docs/start.js", "/docs/assets/swagger-ui-bundle.js"):
            asset = await http.get(path)
            assert "javascript" in asset.headers["content-type"], asset.text
        assert_problem(await http.get("/docs/assets/none.js"), 404, "nothing")


class TestDev:
    """What exists with ``--dev`` only."""

    async def test_no_dev(self, http: httpx.AsyncClient) -> None:
        """Without ``--dev`` the instance serves no tokens and no page."""
        response = await http.post("/v1/dev/token", json={"sub": BOB})
        assert_problem(response, 404, "nothing")
        assert_problem(await http.get("/"), 404, "nothing")

    async def test_token(self, dev_http: httpx.AsyncClient) -> None:
        """The token has the subject and the scopes of the request, or all scopes by default."""
        verify = TokenVerifier(secret=SECRET).verify
        response = await dev_http.post("/v1/dev/token", json={"sub": BOB})
        claims = await verify(response.json()["token"])
        assert claims == Claims(BOB, frozenset({"send", "poke", "admin"}), claims.expires_at)
        wanted = {"sub": BOB, "scope": "send", "ttl_s": 60}
        response = await dev_http.post("/v1/dev/token", json=wanted)
        short = await verify(response.json()["token"])
        assert short == Claims(BOB, frozenset({"send"}), short.expires_at)
        assert short.expires_at < claims.expires_at

    @pytest.mark.parametrize("wanted", [{}, {"sub": ""}, {"sub": "a b"}, {"sub": BOB, "ttl_s": 0}])
    async def test_bad_token_request(
        self, dev_http: httpx.AsyncClient, wanted: dict[str, object]
    ) -> None:
        """A token is for a recipient, and for a while."""
        assert_problem(await dev_http.post("/v1/dev/token", json=wanted), 422, "")


class TestProblems:
    """Every error is a problem (RFC 9457)."""

    async def test_unknown_path(self, http: httpx.AsyncClient) -> None:
        """An unknown path, a slash too many included, is a 404."""
        for path in ("/v1/none", "/v1/messages/", "/v2/messages"):
            assert_problem(await http.get(path), 404, "nothing")

    async def test_encoded_query(self, http: httpx.AsyncClient) -> None:
        """A query is read as forms are: with percent signs, plus signs and empty parts."""
        for query in ("%61fter=%31&&limit=5", "after=1&device=a%2Bb", "after=1&device=caf%65"):
            response = await http.get(f"/v1/messages?{query}", headers=bearer(BOB))
            assert response.status_code == 200, query
        for query in ("after=1&%61fter=1", "after=1&device=a+b", "after=&limit=5"):
            response = await http.get(f"/v1/messages?{query}", headers=bearer(BOB))
            assert response.status_code == 422, query

    async def test_wrong_method(self, http: httpx.AsyncClient) -> None:
        """A wrong method is told all that the path takes (RFC 9110, section 15.5.6)."""
        response = await http.patch("/v1/messages", headers=bearer(BOB))
        assert_problem(response, 405, "GET, HEAD, POST")
        assert response.headers["allow"] == "GET, HEAD, POST"

    async def test_defect(
        self, http: httpx.AsyncClient, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A defect is a 500 that gives nothing away."""
        world.has_a_defect = True
        response = await http.get("/v1/cluster", headers=bearer("root", "admin"))
        assert_problem(response, 500, "log")
        assert "secret" not in response.text

    async def test_what_a_driver_cancels(self, world: World) -> None:
        """A cancellation that was not meant for the request is a defect, too, and is answered."""

        async def not_ready() -> list[str]:
            raise asyncio.CancelledError

        parts = replace(world.parts(), not_ready=not_ready)
        async with http_client(create_api(parts)) as http:
            assert_problem(await http.get("/readyz"), 500, "log")

    async def test_only_http(self, world: World) -> None:
        """A server that starts a lifespan gets an exception, because the app has none."""

        async def nothing(*_: object) -> Message:
            raise AssertionError

        with pytest.raises(ValueError, match="lifespan"):
            await create_api(world.parts())({"type": "lifespan"}, nothing, nothing)  # type: ignore[arg-type]

    async def test_declared_length(self, http: httpx.AsyncClient) -> None:
        """A body that is declared too large is refused without a token, before it is read."""
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            for _ in range(100):
                read += 1
                yield b" " * 1024

        headers = {"Content-Length": str(BODY_CAP_BYTES + 1)}
        response = await http.post("/v1/messages", content=body(), headers=headers)
        assert_problem(response, 413, str(BODY_CAP_BYTES))
        assert read == 0

    @pytest.mark.parametrize(
        ("coding", "status"), [("gzip", 415), ("br, gzip", 415), ("Identity", 202)]
    )
    async def test_coding(self, http: httpx.AsyncClient, coding: str, status: int) -> None:
        """A body is not decompressed, and the answer says so (RFC 9110, section 8.4)."""
        headers = {**bearer(ALICE, "send"), "Content-Encoding": coding}
        body = b'{"recipient":"urn:user:bob","body":1}'
        response = await http.post("/v1/messages", content=body, headers=headers)
        assert response.status_code == status
        if status == 415:
            assert response.headers["accept-encoding"] == "identity"
            assert_problem(response, 415, "Content-Encoding")

    async def test_streamed_length(self, http: httpx.AsyncClient) -> None:
        """A body without a declared length is given up where it crosses the cap."""
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            for _ in range(1000):
                read += 1
                yield b" " * 1024

        response = await http.post("/v1/messages", content=body(), headers=bearer(ALICE, "send"))
        assert_problem(response, 413, str(BODY_CAP_BYTES))
        assert read == BODY_CAP_BYTES // 1024 + 1

    async def test_slow_body(
        self, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A body that does not arrive is given up."""
        monkeypatch.setattr("pokebridge.api.exchange.BODY_DEADLINE_S", 0)

        async def body() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        response = await http.post("/v1/messages", content=body(), headers=bearer(ALICE, "send"))
        assert_problem(response, 408, "too long")

    async def test_vanished_caller(self, world: World) -> None:
        """A caller that disconnects in the middle of its body is not a defect of the server."""
        events: list[Message] = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
        answers: list[Message] = []

        async def receive() -> Message:
            return events.pop(0)

        async def note(message: Message) -> None:
            answers.append(message)

        authorization = bearer(ALICE, "send")["Authorization"].encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/messages",
            "query_string": b"",
            "headers": [(b"authorization", authorization)],
        }
        await create_api(world.parts())(scope, receive, note)
        assert answers[0]["status"] == 400

    @pytest.mark.parametrize(
        ("origins", "origin", "allowed"),
        [
            (["*"], "https://x.example", "*"),
            (["https://x.example"], "https://x.example", "https://x.example"),
            (["https://x.example"], "https://y.example", None),
            (["https://*.x.example"], "https://a.x.example", "https://a.x.example"),
            (["https://*.x.example"], "https://x.example", None),
            ([], "https://x.example", None),
        ],
    )
    async def test_other_origins(
        self, world: World, origins: list[str], origin: str, allowed: str | None
    ) -> None:
        """A browser may call from the origins that are allowed, errors included."""
        app = create_api(replace(world.parts(), allowed_origins=origins))
        async with http_client(app) as http:
            for headers in (bearer(BOB), {}):
                response = await http.get("/v1/messages", headers={**headers, "Origin": origin})
                assert response.headers.get("access-control-allow-origin") == allowed
            preflight = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            for names in (
                "authorization,if-none-match,traceparent,tracestate,baggage",
                "sentry-trace, x-request-id",
            ):
                preflight["Access-Control-Request-Headers"] = names
                response = await http.options("/v1/messages", headers=preflight)
                assert (response.status_code == 200) == (allowed is not None)
                assert (response.headers.get("access-control-allow-headers") == names) == (
                    allowed is not None
                )
            preflight["Access-Control-Request-Private-Network"] = "true"
            response = await http.options("/v1/messages", headers=preflight)
            assert response.status_code == (400 if allowed is None else 200)
            may_reach = "true" if allowed == origin else None
            assert response.headers.get("access-control-allow-private-network") == may_reach
            preflight["Access-Control-Request-Headers"] = "a(b), c"
            assert (await http.options("/v1/messages", headers=preflight)).status_code == 400


async def test_json_of_a_page_is_json(http: httpx.AsyncClient, world: World) -> None:
    """A page built from stored texts parses as a whole."""
    for body in (b'{"a": [1, 2]}', b'"\\u0000"', b"1e2"):
        await world.mailbox.append(NewMessage(BOB, ALICE, "i", body))
    response = await http.get("/v1/messages", headers=bearer(BOB))
    bodies = [message["body"] for message in json.loads(response.content)["messages"]]
    assert bodies == [{"a": [1, 2]}, "\0", 100.0]
