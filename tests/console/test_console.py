"""The console at ``/console``, in a real browser against three real instances."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from importlib.metadata import version
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from nats.aio.client import Client as NatsClient
from playwright.async_api import Locator, Page, expect

from pokebridge.telemetry import Metric
from pokebridge.testing.mailbox_kit import message
from tests.cluster.clusters import metrics
from tests.cluster.traffic import session
from tests.console.conftest import NAMES, RED_LINE, SHARDS, WITH_WORKERS, Complaints, Trio
from tests.support import wait_until
from tests.support.browser import axe_violations, in_chromium
from tests.support.unpoked import commit_unpoked

VERSION = version("pokebridge")
OPERATED_ON = "urn:user:operated-on"
UNPOKED = "urn:user:unpoked"
USERS = [f"urn:user:{number}" for number in range(12)]
# Chromium's message about a refused sign-in. The page shows the reason.
REFUSED = re.compile(r"Failed to load resource: the server responded with a status of 40[13]")


pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def console(page: Page, trio: Trio, complaints: Complaints) -> AsyncIterator[Page]:
    """The console, signed in and live; it may break nothing, and ask nobody else."""
    await page.goto(f"{trio.one.url}/console")
    await sign_in(page, await trio.admin_token())
    await expect(status(page)).to_have_text("live")
    yield page
    assert complaints.lines == []
    assert {urlsplit(url).netloc for url in complaints.urls} == {trio.one.address}
    assert not [url for url in complaints.urls if "eyJ" in url]


async def sign_in(page: Page, token: str) -> None:
    """Fill the form in and send it."""
    await page.get_by_label("Admin token").fill(token)
    await page.get_by_role("button", name="Sign in").click()


def status(page: Page) -> Locator:
    """Whether the page is live."""
    return page.locator(".live")


def row(page: Page, instance: str) -> Locator:
    """An instance in the table."""
    return page.locator(f"tr[data-instance={instance}]")


def cell(page: Page, instance: str, column: str) -> Locator:
    """A figure of an instance."""
    return row(page, instance).locator(f"td[data-label={column}]")


def events(page: Page, kind: str) -> Locator:
    """The events of a kind in the log."""
    return page.locator(f".events li[data-kind={kind}]")


def figure(page: Page, key: str) -> Locator:
    """A number of the whole cluster."""
    return page.locator(f"[data-figure={key}] b")


async def letters(page: Page) -> list[str]:
    """What the grid shows, shard by shard."""
    return await page.locator(".shards .shard").all_text_contents()


async def letter(page: Page, instance: str) -> str:
    """What stands for an instance in the grid."""
    return (await row(page, instance).locator(".mark").text_content()) or ""


async def test_only_an_admin_gets_in(page: Page, trio: Trio, complaints: Complaints) -> None:
    """A wrong token is refused with the API's reason; the right one stays in its tab."""
    await page.goto(f"{trio.one.url}/console")
    error = page.locator("#token-error")
    await sign_in(page, "no.such.token")
    await expect(error).to_contain_text("the token")
    await sign_in(page, trio.one.token("urn:user:eve", "send poke"))
    await expect(error).to_have_text("the token lacks the scope 'admin'")
    await expect(page.locator(".cluster")).to_be_hidden()
    await expect(page.get_by_label("Admin token")).to_be_focused()
    await sign_in(page, await trio.admin_token())
    await expect(page.locator(".cluster")).to_be_visible()  # once the token is kept
    await page.reload()
    await expect(page.locator("tbody tr")).to_have_count(3)
    other = await page.context.new_page()
    await other.goto(f"{trio.one.url}/console")
    await expect(other.get_by_label("Admin token")).to_be_visible()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_label("Admin token")).to_be_visible()
    assert await page.evaluate("JSON.stringify({...sessionStorage, ...localStorage})") == "{}"
    assert await page.context.cookies() == []
    assert [line for line in complaints.lines if not REFUSED.match(line)] == []
    assert not [url for url in complaints.urls if "eyJ" in url or "no.such" in url]


@in_chromium  # it has 2 s, and Firefox may take longer on a busy machine
async def test_a_token_that_ends_signs_out(page: Page, trio: Trio) -> None:
    """The page says why, and asks for another token."""
    await page.goto(f"{trio.one.url}/console")
    await sign_in(page, trio.one.token("urn:user:operator", "admin", ttl_s=2))
    await expect(page.locator("tbody tr")).to_have_count(3)
    await expect(page.locator("#token-error")).to_contain_text("expired")
    await expect(page.locator(".cluster")).to_be_hidden()


async def test_three_instances(console: Page, trio: Trio) -> None:
    """Each shows its state and figures; the grid shows an owner for every shard."""
    for name in NAMES:
        await expect(cell(console, name, "State")).to_have_text("active")
        await expect(cell(console, name, "Shards")).to_have_text(str(SHARDS // 3))
        await expect(cell(console, name, "Memory")).to_have_text(re.compile(r"^\d+ MiB$"))
        await expect(cell(console, name, "Age")).to_have_text(re.compile(r"\d+ s$"))
        url = trio.instances[name].ws_url.removesuffix("/v1/connect")
        await expect(row(console, name).locator("small")).to_have_text(f"{VERSION} · {url}")
    await expect(console.locator("#load-title")).to_have_text("Cluster console")
    async with trio.one.async_http("urn:user:root", "admin") as http:
        totals = (await http.get("/v1/mailbox")).json()
    await expect(figure(console, "mailbox")).to_have_text(f"{totals['messages']:,}")
    await expect(figure(console, "outbox")).to_have_text("0")
    marks = [await letter(console, name) for name in NAMES]
    assert sorted(await letters(console)) == sorted(marks * (SHARDS // 3))
    await expect(events(console, "joined")).not_to_have_count(0)
    async with trio.one.async_http(USERS[0]) as http:
        assert (await http.get("/v1/messages")).status_code == 200
    await expect(cell(console, "one", "Pulls")).to_have_text(re.compile(r"^[\d.]+ ms$"))


@in_chromium  # WebDriver BiDi has no events for WebSockets
async def test_it_is_poked_and_does_not_poll(
    page: Page, trio: Trio, complaints: Complaints
) -> None:
    """What changes is on the page soon; each look at the cluster was asked for by a frame."""
    frames: list[str] = []
    page.on(
        "websocket",
        lambda socket: socket.on("framereceived", lambda payload: frames.append(str(payload))),
    )
    await page.goto(f"{trio.one.url}/console")
    await sign_in(page, await trio.admin_token())
    await expect(figure(page, "sessions")).to_have_text("0")  # the console does not count
    async with trio.sessions(USERS):
        await expect(figure(page, "sessions")).to_have_text(str(len(USERS)))
        await trio.poke(USERS)
        await expect(figure(page, "out")).not_to_have_text("0/s")
    await expect(figure(page, "sessions")).to_have_text("0")
    asked = [urlsplit(url).path for url in complaints.urls]
    pokes = sum('"poke"' in frame for frame in frames)
    assert pokes >= 2
    # The others are the request at the sign-in, and those that register it as a watcher.
    assert asked.count("/v1/cluster") <= 1 + pokes + asked.count("/v1/cluster/watch")
    assert asked.count("/v1/cluster/watch") <= 4


async def test_lost_pokes_are_told(console: Page, trio: Trio) -> None:
    """The page says so when verification has found a message without a poke."""
    async with session(trio.one, UNPOKED) as socket:

        async def is_found() -> bool:
            version = await commit_unpoked(trio.mailbox, message(UNPOKED))
            while json.loads(await socket.recv()).get("version") != version:
                pass
            return (await metrics(trio.one, Metric.POKES_LOST))[0] > 0

        # The first one does not count, because the instance does not know yet what the client has.
        await wait_until(is_found, 60, "a lost poke")
    tile = console.locator("[data-figure=gaps]")
    await expect(tile.locator("small")).to_have_text(re.compile(r"^\d+ lost pokes? sent again$"))
    await expect(tile).to_have_class(re.compile("bad"))


async def test_the_sessions_of_each_worker(console: Page, trio: Trio) -> None:
    """An instance with workers shows how many sessions each of them has, and others only all."""
    async with trio.sessions(USERS):  # a third of them on each instance
        await expect(cell(console, WITH_WORKERS, "Sessions")).to_have_text(
            re.compile(r"^4 \(\d \+ \d\)$")
        )
        await expect(cell(console, "two", "Sessions")).to_have_text("4")


async def test_a_recipient_is_looked_up(console: Page, trio: Trio) -> None:
    """The page tells where somebody is, on whichever instance, and closes their sessions."""
    section = console.locator(".look-up")
    async with trio.sessions([OPERATED_ON] * 2):  # on the first and the second instance
        await section.get_by_label("Recipient", exact=True).fill(OPERATED_ON)
        await section.get_by_role("button", name="Look up").click()
        found = section.locator(".found li")
        await expect(found.filter(has_text="Connected to two")).to_have_count(1)
        await expect(found.filter(has_text="The newest version is 0")).to_have_count(1)
        async with console.expect_response("**/v1/pokes") as answer:
            await section.get_by_role("button", name="Send a test poke").click()
        assert (await answer.value).status == 202
        await expect(found.first).to_contain_text("the test poke is accepted")
    await section.get_by_role("button", name="Disconnect").click()
    await console.get_by_role("dialog").get_by_role("button", name="Disconnect").click()
    await expect(found.first).to_contain_text("disconnected. Clients come back")
    await expect(found.filter(has_text="is not connected")).to_have_count(1)


async def test_an_instance_dies(console: Page, trio: Trio) -> None:
    """Its row goes, its shards show their new owners, and the log says so; then it is back."""
    await asyncio.to_thread(trio.instances["two"].kill)
    await expect(row(console, "two")).to_have_count(0)
    await expect(events(console, "died").first).to_contain_text("two died")
    await expect(events(console, "moved").first).to_contain_text("from two to")
    left = [await letter(console, name) for name in ("one", "three")]
    assert sorted(await letters(console)) == sorted(left * (SHARDS // 2))
    moved = console.locator(".shards .moved")
    await expect(moved).to_have_count(SHARDS // 3)
    await expect(moved.first).to_have_attribute("aria-label", re.compile("moved from two"))
    await asyncio.to_thread(trio.instances["two"].start)
    await expect(cell(console, "two", "State")).to_have_text("active")
    await expect(events(console, "joined").first).to_contain_text("two joined")


async def test_a_migration(console: Page, trio: Trio, complaints: Complaints) -> None:
    """It is asked for in the dialog, refused with the reason, forced, and seen to happen."""
    await _poke_untagged(trio)
    button = console.locator(".migrate")
    await expect(button).to_have_text("Migrate to partitioned…")
    await button.click()
    dialog = console.get_by_role("dialog", name="Migrate to partitioned?")
    await expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    await dialog.get_by_role("button", name="Migrate").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("carry no valid shard")
    complaints.forget("409 (Conflict)")
    await dialog.get_by_role("checkbox").check()
    await dialog.get_by_role("button", name="Migrate").click()
    await expect(dialog).to_be_hidden()
    await expect(console.locator(".mode-name")).to_have_text("partitioned")
    await expect(events(console, "migrating").first).to_contain_text("partitioned")
    await expect(events(console, "migrated").first).to_contain_text("partitioned", timeout=15_000)
    await expect(console.locator(".progress")).to_have_text(re.compile(r"^epoch \d+$"))
    await expect(console.locator(".shards.prepared")).to_have_count(0)
    await expect(button).to_have_text("Migrate to fan-out…")
    assert (await trio.view())["mode"] == "partitioned"


async def _poke_untagged(trio: Trio) -> None:
    nats = NatsClient()
    await nats.connect(trio.nats.url)
    for _ in range(200):
        await nats.publish("push-notifications~console", b'{"recipient":"urn:user:nobody"}')
    await nats.close()

    async def is_measured() -> bool:
        view = await trio.view()
        return all(each["untagged_share"] > 0.01 for each in view["instances"])

    await wait_until(is_measured, what="the share of untagged signals")


async def test_a_drain(console: Page, trio: Trio) -> None:
    """Nothing happens without the confirmation; with it the instance gives its shards up."""
    await row(console, "three").get_by_role("button", name="Drain three").click()
    dialog = console.get_by_role("dialog", name="Drain three?")
    await console.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    await expect(row(console, "three").get_by_role("button")).to_be_focused()
    await row(console, "three").get_by_role("button").click()
    await dialog.get_by_role("button", name="Drain").click()
    await expect(cell(console, "three", "Shards")).to_have_text("0")
    await expect(cell(console, "three", "State")).to_have_text("drained")
    await expect(row(console, "three").get_by_role("button")).to_be_disabled()
    await expect(events(console, "draining").first).to_contain_text("three")
    assert await letter(console, "three") not in await letters(console)


async def test_over_the_red_line(console: Page, trio: Trio) -> None:
    """The page says so when the API does, with the figure and what to do."""
    banner = console.locator(".banner.over")
    await expect(banner).to_be_hidden()
    one_in_each_shard = [f"urn:user:{number}" for number in range(1000)]

    async def is_over() -> bool:
        await trio.poke(one_in_each_shard)
        return bool((await trio.view())["traffic"]["over_red_line"])

    await wait_until(is_over, what="the red line crossed")
    await expect(banner).to_contain_text("Over the red line")
    await expect(banner).to_contain_text(f"of {RED_LINE}")
    await expect(console.locator("[data-figure=ops]")).to_have_class(re.compile("bad"))


async def test_a_broken_transport(console: Page, trio: Trio) -> None:
    """The page still updates, and says what is wrong."""
    trouble = console.locator(".banner.trouble")
    await expect(trouble).to_be_hidden()
    await asyncio.to_thread(trio.nats.kill)
    await expect(trouble).to_contain_text("one: The coordination store does not answer (nats://")
    await expect(trouble).to_contain_text("The transport is not known to deliver (nats://")
    await expect(trouble).to_contain_text("Connection refused")
    await expect(trouble).not_to_contain_text("Errno")
    await expect(status(console)).to_have_text("live; one is in trouble")
    await expect(console.locator("tbody tr").first).to_contain_text("in doubt")
    await asyncio.to_thread(trio.nats.start)
    await expect(trouble).to_be_hidden(timeout=15_000)
    await expect(status(console)).to_have_text("live")
    await expect(figure(console, "gaps")).not_to_have_text("0")
    await expect(events(console, "gap").first).to_contain_text("every session concerned was poked")


async def test_by_keyboard_alone(page: Page, trio: Trio) -> None:
    """Signing in, asking for a migration and reading the grid take no mouse; focus is seen."""
    await page.goto(f"{trio.one.url}/console")
    await expect(page.get_by_label("Admin token")).to_be_focused()
    await page.keyboard.insert_text(await trio.admin_token())
    await page.keyboard.press("Enter")
    # The table is filled before it is shown, and until then the sign-in form has the focus.
    await expect(page.locator(".migrate")).to_be_visible()
    await _tab_to(page, page.locator(".migrate"))
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_be_visible()
    await page.keyboard.press("Enter")  # on Cancel
    await expect(page.get_by_role("dialog")).to_be_hidden()
    await _tab_to(page, page.locator("[data-shard='0']"))
    await page.keyboard.press("ArrowRight")
    await expect(page.locator("[data-shard='1']")).to_be_focused()
    await expect(page.locator(".shard-detail")).to_contain_text("Shard 1: owned by")
    await page.keyboard.press("End")
    await expect(page.locator(f"[data-shard='{SHARDS - 1}']")).to_be_focused()
    await _tab_to(page, page.locator(".event-log"))


async def _tab_to(page: Page, target: Locator) -> None:
    """Press Tab until ``target`` has the focus; wherever the focus is, it can be seen."""
    for _ in range(20):
        await page.keyboard.press("Tab")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await page.evaluate(outline) != "none"
        if await target.evaluate("it => it === document.activeElement"):
            return
    pytest.fail("Tab does not lead there")


async def test_accessible(page: Page, trio: Trio) -> None:
    """Axe finds nothing wrong with the sign-in, with the cluster, or with a question."""
    await page.goto(f"{trio.one.url}/console")
    await expect(page.get_by_label("Admin token")).to_be_visible()
    assert await axe_violations(page) == []
    await sign_in(page, await trio.admin_token())
    await expect(events(page, "joined")).not_to_have_count(0)
    assert await axe_violations(page) == []
    await page.locator(".migrate").click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    assert await axe_violations(page) == []


@pytest.mark.parametrize("width", [390, 1280])
async def test_it_fits(console: Page, width: int) -> None:
    """Nothing sticks out to the side, the dialog included, on a desk or in a hand."""
    await console.set_viewport_size({"width": width, "height": 844})
    await console.locator(".migrate").click()
    await expect(console.get_by_role("dialog")).to_be_visible()
    assert await console.evaluate("document.documentElement.scrollWidth") <= width
    box = await console.get_by_role("dialog").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    charts = console.locator("figure canvas")
    await expect(charts).to_have_count(4)


async def test_a_large_cluster_fits(page: Page, trio: Trio) -> None:
    """As many shards as there may be, on more instances than a test can start, with long names."""
    view = await trio.view()
    one = view["instances"][0]
    view["shard_count"] = 10_000
    view["instances"] = [
        one | {"id": f"{number}-" + "n" * 60, "shards": list(range(number, 10_000, 50))}
        for number in range(50)
    ]
    await page.route("**/v1/cluster", lambda route: route.fulfill(json=view))
    await page.set_viewport_size({"width": 390, "height": 844})
    await page.goto(f"{trio.one.url}/console")
    await sign_in(page, await trio.admin_token())
    await expect(page.locator("tbody tr")).to_have_count(50)
    await expect(page.locator(".shards .shard")).to_have_count(10_000)
    assert (await letters(page))[49] == "AX"
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
    await page.set_viewport_size({"width": 1280, "height": 844})
    assert await page.evaluate("document.documentElement.scrollWidth") <= 1280


async def test_a_development_token(console: Page) -> None:
    """With ``--dev`` one click makes a token."""
    await console.get_by_role("button", name="Sign out").click()
    await console.get_by_role("button", name="development token").click()
    await expect(console.locator("tbody tr")).to_have_count(3)


async def test_charts_that_fail_leave_the_rest(page: Page, trio: Trio) -> None:
    """WebKitGTK under ``LANG=C`` says that its language is "C", which no formatter takes."""
    await page.add_init_script("Object.defineProperty(navigator, 'language', {value: 'C'})")
    await page.goto(f"{trio.one.url}/console")
    await sign_in(page, await trio.admin_token())
    await expect(status(page)).to_have_text("live")
    await expect(row(page, NAMES[0])).to_be_visible()
    await expect(page.locator(".charts")).to_contain_text("can't draw the charts")
