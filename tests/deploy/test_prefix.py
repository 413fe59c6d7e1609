"""An instance below a path prefix, behind a real nginx that removes the prefix, or does not."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Browser, expect
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from pokebridge.client import PokeClient, ReceivedMessage
from tests.deploy.proxies import Proxy, nginx_with
from tests.support import Instance, Serve, free_port, wait_until

pytestmark = pytest.mark.asyncio(loop_scope="session")

BOB = "urn:user:bob"
LOCATION = """
location /bridge/ {{
    proxy_pass http://{address}{removes};
    proxy_http_version 1.1;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $connection_upgrade;
    proxy_read_timeout 90s;
    {fields}
}}
"""
HOST = "proxy_set_header Host $http_host;"
# As proxies do that set Host to the instance's own name.
FORWARDED_HOST = (
    "proxy_set_header X-Forwarded-Host $host; proxy_set_header X-Forwarded-Port $server_port;"
)
PREFIX = "proxy_set_header X-Forwarded-Prefix /bridge;"
# Whether nginx removes the prefix, which headers it sets, and the instance's settings.
SITES = {
    "removed": ("/", HOST, {"path_prefix": "/bridge"}),
    "kept": ("", HOST, {"path_prefix": "/bridge/"}),
    "removed and told": ("/", HOST + PREFIX, {"trusted_proxies": "127.0.0.0/8"}),
    "another host": ("/", FORWARDED_HOST + PREFIX, {"trusted_proxies": "127.0.0.0/8"}),
}


@contextmanager
def site(serve: Serve, directory: Path, kind: str, *, dev: bool) -> Iterator[tuple[Instance, str]]:
    """An instance, and the URL at which nginx serves it."""
    removes, fields, settings = SITES[kind]
    instance = serve(mailbox="memory://", dev=dev, **settings)
    location = LOCATION.format(address=instance.address, removes=removes, fields=fields)
    port = free_port()
    proxy: Proxy = nginx_with(location, port=port, directory=directory)
    proxy.start()
    try:
        yield instance, f"http://127.0.0.1:{port}/bridge"
    finally:
        proxy.kill()


@pytest.fixture(params=SITES)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of site."""
    return str(request.param)


async def test_clients_get_through(serve: Serve, tmp_path: Path, kind: str) -> None:
    """connect-info has the prefix, and a client with the prefix in its URL gets its messages."""
    got: list[object] = []

    async def show(messages: list[ReceivedMessage]) -> None:
        got.extend(message.body for message in messages)

    with site(serve, tmp_path, kind, dev=False) as (instance, url):
        token = instance.token(BOB, "send")
        async with httpx.AsyncClient(trust_env=False) as http:
            http.headers["Authorization"] = f"Bearer {token}"
            info = (await http.get(f"{url}/v1/connect-info")).json()
            assert info["url"] == f"ws{url.removeprefix('http')}/v1/connect"
            async with PokeClient(url, token, show) as client:  # type: ignore[arg-type]
                await client.wait_ready(30)
                message = {"recipient": BOB, "body": "hello"}
                assert (await http.post(f"{url}/v1/messages", json=message)).status_code == 202
                await wait_until(lambda: got == ["hello"])
            assert (await http.get(f"{url}/nothing")).status_code == 404


async def test_the_own_origin_is_allowed(serve: Serve, tmp_path: Path, kind: str) -> None:
    """A page of the site may connect, whatever Host the instance sees. Others may not."""
    with site(serve, tmp_path, kind, dev=False) as (instance, url):
        ws = f"ws{url.removeprefix('http')}/v1/connect"
        headers = instance.headers(BOB)
        own = url.removesuffix("/bridge")
        async with connect(ws, origin=own, additional_headers=headers, proxy=None) as socket:  # type: ignore[arg-type]
            assert "ready" in str(await asyncio.wait_for(socket.recv(), 30))
        for stranger in ("https://evil.example", f"http://127.0.0.1:{free_port()}"):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(
                    ws,
                    origin=stranger,  # type: ignore[arg-type]
                    additional_headers=headers,
                    proxy=None,
                ):
                    pass
            assert refused.value.response.status_code == 403


@pytest.mark.parametrize("kind", ["removed", "kept"])
async def test_pages_work(serve: Serve, tmp_path: Path, kind: str, browser: Browser) -> None:
    """The playground, the console and the API's description load everything, and connect."""
    failed: list[str] = []
    tab = await browser.new_page()
    tab.on(
        "response",
        lambda response: failed.append(response.url) if response.status >= 400 else None,
    )
    with site(serve, tmp_path, kind, dev=True) as (_, url):
        await tab.goto(f"{url}/")
        await expect(tab.locator("[data-state=ready]")).to_have_count(2)
        await tab.goto(f"{url}/docs")
        await tab.wait_for_selector(".opblock")
        await tab.goto(f"{url}/console")
        await tab.wait_for_selector(".dev-token:not([hidden])")
    assert failed == []
