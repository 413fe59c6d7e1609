"""The README of every example does what it says, typed as it stands in a fresh checkout."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.examples.apps import EXAMPLES
from tests.examples.checkout import Checkout
from tests.examples.google import Google
from tests.support import Daemon, wait_until
from tests.support.browser import in_chromium
from tests.support.missing import require
from tests.support.stream_server import stream_server

pytestmark = [pytest.mark.long, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]

# Two of the examples have their own tests.
NAMES = {each.parent.name for each in EXAMPLES.glob("*/README.md")} - {"fcm", "three-instances"}
SEND = '.venv/bin/pokebridge send urn:user:bob \'{"text": "hello"}\''


@pytest_asyncio.fixture(loop_scope="session")
async def checkout(tmp_path: Path) -> AsyncIterator[Checkout]:
    """A checkout of the test's own. Its end presses Ctrl-C in every terminal."""
    for program in ("curl", "npm", "openssl"):
        require(program)
    checkout = await asyncio.to_thread(Checkout, tmp_path / "pokebridge")
    yield checkout
    await asyncio.to_thread(checkout.close)


@asynccontextmanager
async def tabs(browser: Browser, *urls: str) -> AsyncIterator[list[Page]]:
    """A tab for each URL, all in one browser profile. None may throw."""
    errors: list[str] = []
    context = await browser.new_context()
    pages = []
    for url in urls:
        page = await context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        await page.goto(url)
        pages.append(page)
    yield pages
    assert errors == []


async def press(page: Page, label: str, text: str, button: str) -> None:
    """Fill a form in and send it."""
    await page.get_by_label(label).fill(text)
    await page.get_by_role("button", name=button, exact=True).click()


async def metrics(url: str) -> str:
    """What an instance counts."""
    async with httpx.AsyncClient(trust_env=False) as http:
        return (await http.get(f"{url}/metrics")).text


async def document(checkout: Checkout, browser: Browser) -> None:
    """A document that Ann shares appears in Bob's list, and what Ann writes Bob sees."""
    users = (f"{checkout.app}/?user={name}" for name in ("ann", "bob"))
    async with tabs(browser, *users) as (ann, bob):
        await press(ann, "Title", "Plans", "New document")
        await ann.get_by_role("button", name="Plans").click()
        await press(ann, "Share it with", "bob", "Share")
        await bob.get_by_role("button", name="Plans").click()
        await press(ann, "Next paragraph", "Water the plants.", "Add")
        await expect(bob.get_by_label("Paragraph 1")).to_have_value("Water the plants.")


async def node_worker(checkout: Checkout, browser: Browser) -> None:
    """The worker says what it has added."""
    del browser
    await asyncio.to_thread(checkout.terminal("npm start").wait_for, ": 1 + 2 + 3 = 6")


async def own_table(checkout: Checkout, browser: Browser) -> None:
    """The note that curl adds is printed by the client that watches."""
    del browser
    await asyncio.to_thread(checkout.terminal("watch.py").wait_for, "1 hello\n")


async def page(checkout: Checkout, browser: Browser) -> None:
    """Bob's two tabs show what Alice writes to him, and share one socket."""
    users = (f"{checkout.app}/examples/page/?user={name}" for name in ("bob", "bob", "alice"))
    async with tabs(browser, *users) as (bob, bobs_other, alice):
        for tab in (bob, bobs_other, alice):
            await expect(tab.locator("#state")).to_have_text("connected")
        await press(alice, "say", "hello", "Send")
        for tab in (bob, bobs_other):
            await expect(tab.locator("#messages")).to_contain_text("alice: hello")
        assert "\npokebridge_sessions 2.0" in await metrics(checkout.bridge)


async def react(checkout: Checkout, browser: Browser) -> None:
    """The address that Vite prints shows Bob what is sent to him."""
    printed = re.search(r"http://\S+", checkout.terminal("npm run dev").shown())
    assert printed
    async with tabs(browser, printed[0], f"{checkout.bridge}/") as (bob, playground):
        await expect(bob.locator("output")).to_have_text("connected")
        await playground.locator("[data-user=left] .text").fill("hello")
        await playground.locator("[data-user=left] .text").press("Enter")
        await expect(bob.locator("li")).to_have_text("urn:user:alice: hello")


async def replicache(checkout: Checkout, browser: Browser) -> None:
    """A change of the list in one browser appears in the other."""
    async with tabs(browser, checkout.app) as (ann,), tabs(browser, checkout.app) as (bob,):
        await press(ann, "What to do", "water the plants", "Add")
        await expect(bob.locator("li")).to_have_text("water the plants Done")


PROMISES: dict[str, Callable[[Checkout, Browser], Awaitable[None]]] = {
    "document": document,
    "node-worker": node_worker,
    "own-table": own_table,
    "page": page,
    "react": react,
    "replicache": replicache,
}


@in_chromium
@pytest.mark.parametrize("example", sorted(NAMES))
async def test_a_readme(checkout: Checkout, browser: Browser, example: str) -> None:
    """Each command does its work, and then the example does what its README promises."""
    await asyncio.to_thread(checkout.type_all, example)
    await PROMISES[example](checkout, browser)


async def test_the_readme_of_fcm(checkout: Checkout) -> None:
    """A message for Bob, who has no socket, wakes the phone that curl has registered."""
    google = Google()
    google.write_account(checkout.path / "service-account.json")
    await asyncio.to_thread(
        checkout.type, f"export FCM_URL={google.url} POKEBRIDGE_PUSH_GRACE_S=0.2"
    )
    async with stream_server(google.serve, port=google.port):
        await asyncio.to_thread(checkout.type_all, "fcm")
        await asyncio.to_thread(checkout.type, SEND)
        await wait_until(lambda: google.woken == {"fcm-registration-token": 1})
        # Its database is where the README says.
        assert (checkout.path / "var" / "devices.db").exists()
        await asyncio.to_thread(checkout.close)


@pytest.mark.parametrize("broker", ["", "redis://127.0.0.1:6379", "PUBSUB_EMULATOR_HOST"])
async def test_the_readme_of_three_instances(
    checkout: Checkout, request: pytest.FixtureRequest, broker: str
) -> None:
    """The script prints the README's lines, whichever of the README's brokers it uses."""
    setup, *runs = checkout.commands("three-instances")
    (run,) = [each for each in runs if broker in each and (broker or "--transport" not in each)]
    if broker:
        engine = "own_valkey_server" if "redis" in broker else "own_pubsub_emulator"
        server: Daemon = request.getfixturevalue(engine)
        run = re.sub(r"127\.0\.0\.1:\d+", server.address, run)
    await asyncio.to_thread(checkout.type, setup)
    shown = await asyncio.to_thread(checkout.type, run)
    readme = await asyncio.to_thread((EXAMPLES / "three-instances" / "README.md").read_text)

    def after_the_broker(text: str, indent: str = "") -> list[str]:
        story = re.findall(rf"^{indent}(\w+ {{2,}}.+)$", text, re.MULTILINE)
        return [re.sub(r"127\.0\.0\.1:\d+", "", line) for line in story[1:]]

    # An instance on a busy machine may log something in between.
    assert after_the_broker(shown) == after_the_broker(readme, " " * 4)
    for url in re.findall(r"http://\S+", shown):
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"{url}/")).status_code == httpx.codes.OK
    await asyncio.to_thread(checkout.close)  # before its broker is gone
