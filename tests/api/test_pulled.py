"""What counts as pulled: what the API tells the push fallback."""

from collections.abc import AsyncIterator

import httpx
import pytest

from pokebridge.api.app import create_api
from pokebridge.testing.mailbox_kit import fill, message
from tests.api.api_world import BOB, World, bearer, http_client


@pytest.fixture
def world() -> World:
    """What stands behind the API."""
    return World()


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """Bob's client of the API."""
    async with http_client(create_api(world.parts())) as client:
        client.headers.update(bearer(BOB))
        yield client


async def test_a_whole_page_reaches_the_head(http: httpx.AsyncClient, world: World) -> None:
    """Messages missing from the page have expired, so nothing is left to pull."""
    await fill(world.mailbox, 2, BOB)
    await world.mailbox.append(message(BOB, ttl_s=0))
    assert (await http.get("/v1/messages")).json()["version"] == 2
    assert world.pulled == [(BOB, 3)]


async def test_a_cut_page_reaches_its_last_message(http: httpx.AsyncClient, world: World) -> None:
    """The rest has not been pulled yet."""
    await fill(world.mailbox, 3, BOB)
    await http.get("/v1/messages", params={"limit": 2})
    await http.get("/v1/messages", params={"limit": 2, "after": 2})
    assert world.pulled == [(BOB, 2), (BOB, 3)]


async def test_who_has_the_head_says_so(http: httpx.AsyncClient, world: World) -> None:
    """An empty pull, one that is answered 304, and an ack."""
    await fill(world.mailbox, 2, BOB)
    empty = await http.get("/v1/messages", params={"after": 2})
    answer = await http.get("/v1/messages", headers={"If-None-Match": empty.headers["etag"]})
    assert answer.status_code == httpx.codes.NOT_MODIFIED
    await http.post("/v1/messages/ack", json={"version": 1})
    assert world.pulled == [(BOB, 2), (BOB, 2), (BOB, 1)]


async def test_a_pull_that_fails_is_none(http: httpx.AsyncClient, world: World) -> None:
    """A refused call, or one that the mailbox could not answer, does not count as a pull."""
    await http.get("/v1/messages", headers={"Authorization": "Bearer nonsense"})
    await http.get("/v1/messages", params={"after": "x"})
    await world.mailbox.close()
    answer = await http.get("/v1/messages")
    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert world.pulled == []


@pytest.mark.parametrize(
    ("body", "shown"),
    [(b"oops", "oops"), (b'"\xff"', '"\ufffd"'), (b'"\\ud800"', '"\\ud800"'), (b"1e999", "1e999")],
)
async def test_a_body_that_is_no_json_spoils_no_page(
    http: httpx.AsyncClient, world: World, body: bytes, shown: str
) -> None:
    """Another program has written it: it is shown as text, and the next message comes with it."""
    await world.mailbox.append(message(BOB, body=body))
    await fill(world.mailbox, 1, BOB)
    page = (await http.get("/v1/messages")).json()
    assert [each["body"] for each in page["messages"]] == [shown, {}]
