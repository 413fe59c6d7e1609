"""What the console is made of, as the API serves it."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pokebridge import console
from pokebridge.api.app import create_api
from tests.api.api_world import ENTRY, INSTANCE, World, bearer, http_client

STATIC = Path(console.__file__).parent / "static"


async def test_it_is_there_without_dev() -> None:
    """The console wherever there is an API; the playground at ``/`` with ``--dev`` alone."""
    async with http_client(create_api(World().parts())) as http:
        page = await http.get("/console")
        assert page.headers["content-type"].startswith("text/html")
        assert "connect-src 'self';" in page.headers["content-security-policy"]
        assert (await http.get("/assets/console/app.js")).status_code == 200
        assert (await http.get("/")).status_code == 404
    async with http_client(create_api(World().dev_parts())) as http:
        assert (await http.get("/")).status_code == 200
    async with http_client(create_api(replace(World().parts(), has_calls=False))) as http:
        assert (await http.get("/console")).status_code == 404


@pytest.mark.parametrize("path", ["/", "/console"])
async def test_headers(path: str) -> None:
    """A page allows no script but its own, and is asked about before it is used again."""
    async with http_client(create_api(World().dev_parts())) as http:
        page = await http.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
        assert "require-trusted-types-for 'script'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
        for file, kind in (
            ("/assets/playground/app.js", "javascript"),
            ("/assets/shared/base.css", "text/css"),
        ):
            first = await http.get(file)
            assert kind in first.headers["content-type"]
            assert first.headers["cache-control"] == "no-cache"
            again = await http.get(file, headers={"If-None-Match": first.headers["etag"]})
            assert again.status_code == 304
        assert (await http.get("/assets/%2e%2e/__init__.py")).status_code == 404


@pytest.mark.parametrize("file", sorted(STATIC.rglob("*.html")), ids=lambda file: file.parent.name)
def test_no_page_has_anything_inline_or_from_elsewhere(file: Path) -> None:
    """Nothing that its content policy would refuse."""
    page = file.read_text()
    assert "style=" not in page
    assert "<style" not in page
    assert "//" not in page
    linked = re.findall(r'(?:src|href)="([^"]*)"', page)
    # Relative, so that the page also works below a path prefix.
    assert all(re.match(r"[a-z]+(/|$)", url) for url in linked)
    assert len(re.findall("<script", page)) == len(re.findall(r'<script[^>]* src="', page))


def test_the_chart_library_is_as_it_was_published() -> None:
    """The file is the release that NOTICE names, unchanged, with its license."""
    library = STATIC / "vendor/uplot"
    script = (library / "uPlot.iife.min.js").read_bytes()
    assert b"uPlot (v1.6.32)" in script
    assert hashlib.sha256(script).hexdigest() == (
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    )
    assert "Leon Sorokin" in (library / "LICENSE").read_text()


async def test_events() -> None:
    """Admins get the events that the instance has seen."""
    async with http_client(create_api(World().parts())) as http:
        refused = await http.get("/v1/cluster/events", headers=bearer("bob", "send poke"))
        assert refused.status_code == 403
        told = (await http.get("/v1/cluster/events", headers=bearer("root", "admin"))).json()
        assert (told["seen_by"], told["count"]) == (INSTANCE, 1)
        assert told["events"][0]["text"] == ENTRY.text


async def test_watching() -> None:
    """The token's subject is poked on changes, and must be an admin."""
    world = World()
    async with http_client(create_api(world.parts())) as http:
        refused = await http.put("/v1/cluster/watch", headers=bearer("bob", "send poke"))
        assert refused.status_code == 403
        assert world.watching == []
        watched = await http.put("/v1/cluster/watch", headers=bearer("root", "admin"))
        assert watched.json() == {"for_s": 30}
        assert world.watching == ["root"]
