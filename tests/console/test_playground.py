"""The page at ``/``, in a real browser against a real instance."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from tests.support import Instance, Serve
from tests.support.browser import axe_violations, in_chromium

pytestmark = pytest.mark.asyncio(loop_scope="session")

STEPS = ["commit", "poke", "pull", "shown"]


@pytest.fixture
def instance(serve: Serve) -> Instance:
    """An instance with ``--dev`` and an empty mailbox."""
    return serve("--mailbox", "memory://")


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser, instance: Instance) -> AsyncIterator[Page]:
    """The page with both users connected. It may not break its own content policy, nor throw."""
    context = await browser.new_context()
    page = await context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    await page.goto(instance.url)
    for user in (alice(page), bob(page)):
        await expect(user.locator(".state")).to_have_text("connected")
    yield page
    assert complaints == []


def alice(page: Page) -> Locator:
    """The user on the left."""
    return page.locator("[data-user=left]")


def bob(page: Page) -> Locator:
    """The user on the right."""
    return page.locator("[data-user=right]")


async def send(user: Locator, text: str) -> None:
    """Write ``text`` and press enter."""
    await user.get_by_role("textbox", name="message to").fill(text)
    await user.get_by_role("textbox", name="message to").press("Enter")


async def expect_steps(trace: Locator, steps: list[str]) -> None:
    """The trace shows ``steps``, each with its duration, and the time from end to end."""
    await expect(trace.locator("dd")).to_have_text([re.compile(r"^\d+(\.\d)? ms$")] * len(steps))
    shown = await trace.locator("dd").evaluate_all("all => all.map(dd => dd.dataset.step)")
    assert shown == steps
    await expect(trace.locator(".total")).to_have_text(re.compile(r"^\d+(\.\d)? ms$"))


async def test_both_ways(page: Page) -> None:
    """A message is shown at the other user with all its steps timed, in both directions."""
    for sender, recipient, names in (
        (alice(page), bob(page), "alice → bob"),
        (bob(page), alice(page), "bob → alice"),
    ):
        text = f"<b>hello</b> from {names}"
        await send(sender, text)
        await expect(recipient.locator(".message.theirs .body")).to_have_text(text)
        await expect(sender.locator(".message.own .note")).to_have_text(
            re.compile(r"version 1 · shown after \d+(\.\d)? ms")
        )
        trace = page.locator(".trace").first
        await expect(trace.locator(".who")).to_have_text(names)
        await expect_steps(trace, STEPS)


async def test_the_room(page: Page) -> None:
    """A message to the room appears for both members, over their existing sockets."""
    for user in (alice(page), bob(page)):
        await user.get_by_label("in the room").check()
        await expect(user.locator(".room-state")).to_have_text("connected")
    await alice(page).get_by_role("textbox", name="message to").fill("hello, all")
    await alice(page).get_by_role("button", name="To the room").click()
    for user in (alice(page), bob(page)):
        await expect(user.locator(".message .body")).to_have_text("hello, all")
        await expect(user.locator(".message .note")).to_have_text(re.compile("alice · .* · room"))
    await bob(page).get_by_label("in the room").uncheck()
    await expect(bob(page).get_by_role("button", name="To the room")).to_be_hidden()
    await alice(page).get_by_role("textbox", name="message to").fill("bob is out")
    await alice(page).get_by_role("button", name="To the room").click()
    await expect(alice(page).locator(".message .body")).to_have_text(["hello, all", "bob is out"])
    await send(alice(page), "to you alone")
    await expect(bob(page).locator(".message .body")).to_have_text(["hello, all", "to you alone"])
    await expect(page.locator(".trace")).to_have_count(1)


async def test_poke_only(page: Page) -> None:
    """A bare poke makes the other one pull, and the pull finds nothing new."""
    await alice(page).get_by_role("button", name="Poke only").click()
    await expect(page.locator(".trace dt").last).to_have_text("pull, nothing new")
    await expect_steps(page.locator(".trace"), ["commit", "poke", "pull"])
    await expect(bob(page).locator(".message")).to_have_count(0)


async def test_without_a_mailbox(browser: Browser, serve: Serve) -> None:
    """The page of such an instance offers pokes, no messages, and calls nothing absent."""
    instance = serve("--no-mailbox")
    page = await browser.new_page()
    answers: list[int] = []
    page.on("response", lambda response: answers.append(response.status))
    await page.goto(instance.url)
    for user in (alice(page), bob(page)):
        await expect(user.locator(".state")).to_have_text("connected")
        await expect(user.locator(".text")).to_be_hidden()
    await expect(page.get_by_text("it carries pokes only")).to_be_visible()
    await alice(page).get_by_role("button", name="Poke").click()
    await expect_steps(page.locator(".trace"), ["commit", "poke", "pull"])
    assert max(answers) < 400
    await page.close()


async def test_away(page: Page) -> None:
    """A message to a disconnected user arrives by the pull after ``ready``."""
    await bob(page).get_by_role("button", name="Disconnect").click()
    await expect(bob(page).locator(".state")).to_have_text("disconnected")
    await send(alice(page), "while you were out")
    await expect(alice(page).locator(".message.own .note")).to_have_text("version 1")
    await bob(page).get_by_role("button", name="Connect").click()
    await expect(bob(page).locator(".message.theirs .body")).to_have_text("while you were out")
    await expect(page.locator(".trace dt").nth(1)).to_have_text("ready")


async def test_two_devices(page: Page, instance: Instance) -> None:
    """The page in a second window is a second device: both show the message."""
    assert page.context.browser is not None
    second = await page.context.browser.new_page()
    await second.goto(instance.url)
    await expect(bob(second).locator(".state")).to_have_text("connected")
    await send(alice(page), "to all of you")
    for window in (page, second):
        await expect(bob(window).locator(".message.theirs .body")).to_have_text("to all of you")
    await second.close()


async def test_revoked_and_renamed(page: Page, instance: Instance) -> None:
    """After 4401 the page gets a new token and reconnects. A new name is a new recipient."""
    sessions = bob(page).locator(".log li", has_text='"ready"')
    await expect(sessions).to_have_count(1)
    async with instance.async_http("root", "admin") as http:
        assert (await http.delete("/v1/sessions/urn:user:bob")).status_code == 204
    await expect(sessions).to_have_count(2)
    await expect(bob(page).locator(".log li", has_text="closed 4401")).to_have_count(1)

    name = bob(page).get_by_role("textbox", name="Name of the right user")
    await name.press("ControlOrMeta+a")
    await name.press_sequentially("carol")  # Firefox reports no change of a filled field
    await name.press("Enter")
    await expect(bob(page).locator(".facts")).to_contain_text("urn:user:carol · shard")
    await expect(bob(page).locator(".state")).to_have_text("connected")
    await send(alice(page), "hello carol")
    await expect(bob(page).locator(".message.theirs .body")).to_have_text("hello carol")


async def test_replaced(browser: Browser, serve: Serve) -> None:
    """4409 stops the page: it does not fight with the session that replaced it."""
    instance = serve("--mailbox", "memory://", max_sessions_per_recipient=1)
    first, second = await browser.new_page(), await browser.new_page()
    await first.goto(instance.url)
    await expect(bob(first).locator(".state")).to_have_text("connected")
    await second.goto(instance.url)
    await expect(bob(first).locator(".state")).to_have_text("replaced by a newer session")
    await expect(bob(second).locator(".state")).to_have_text("connected")
    await expect(bob(first).get_by_role("button", name="Connect")).to_be_visible()


async def devices(page: Page, step: Callable[[], Awaitable[object]]) -> set[str]:
    """What the page's sockets that open during ``step`` say of its device."""
    urls: list[str] = []
    page.on("websocket", lambda socket: urls.append(socket.url))
    await step()
    for user in (alice(page), bob(page)):
        await expect(user.locator(".state")).to_have_text("connected")
    return {parse_qs(urlsplit(url).query)["device"][0] for url in urls}


@in_chromium  # WebDriver BiDi has no events for WebSockets
async def test_a_reload_is_the_same_device(page: Page, instance: Instance) -> None:
    """A reloaded page continues where it was. A second tab is another device."""
    await send(alice(page), "once")
    await expect(bob(page).locator(".message.theirs .body")).to_have_text("once")
    await expect(bob(page).locator(".log li", has_text='→ {"type":"ack"')).to_have_count(1)
    first = await devices(page, page.reload)
    second = await page.context.new_page()
    other = await devices(second, partial(second.goto, instance.url))
    await second.close()
    assert await devices(page, page.reload) == first
    assert len(first | other) == 2
    await send(alice(page), "twice")
    await expect(bob(page).locator(".message.theirs .note")).to_contain_text("version 2")
    await expect(bob(page).locator(".message .body")).to_have_text(["twice"])


async def test_frames_leave_room_for_messages(page: Page) -> None:
    """On a phone, the list of frames takes no room from the messages."""
    await page.set_viewport_size({"width": 390, "height": 844})
    await bob(page).get_by_text("Frames and requests").click()
    await expect(bob(page).locator(".log ol")).to_be_visible()
    for part in (".well", ".log ol"):
        box = await bob(page).locator(part).bounding_box()
        assert box is not None
        assert box["height"] >= 150
    card, composer = [await bob(page).locator(part).bounding_box() for part in (".log", "form")]
    assert card is not None
    assert composer is not None
    assert card["y"] >= composer["y"] + composer["height"]


async def test_accessible(page: Page) -> None:
    """Axe finds nothing wrong with the page, empty or with so many messages that lists scroll."""
    assert await axe_violations(page) == []
    await bob(page).get_by_text("Frames and requests").click()
    for count in range(1, 21):
        await send(alice(page), "hello")
        await expect(bob(page).locator(".message.theirs")).to_have_count(count)
    for scrolling in (".log-of-messages", ".log ol"):
        room = "list => list.scrollHeight - list.clientHeight"
        assert await bob(page).locator(scrolling).evaluate(room) > 50
    assert await axe_violations(page) == []


@pytest.mark.parametrize("width", [1280, 390])
async def test_fits(page: Page, width: int) -> None:
    """Nothing sticks out to the side, on a desk or in a hand, however long a message is."""
    await page.set_viewport_size({"width": width, "height": 844})
    await send(alice(page), "x" * 500)
    await expect(bob(page).locator(".message.theirs")).to_be_visible()
    assert await page.evaluate("document.documentElement.scrollWidth") <= width


async def test_docs_render(browser: Browser, instance: Instance) -> None:
    """The page to try the API shows its calls, under its own content policy."""
    page = await browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    await page.goto(f"{instance.url}/docs")
    await expect(page.locator("#operations-default-pull")).to_be_visible()
    assert complaints == []
