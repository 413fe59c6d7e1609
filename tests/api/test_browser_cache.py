"""One user's answers and the next user's, in one real browser."""

import asyncio

import pytest
from playwright.async_api import Browser

from tests.support.serving import Serve

pytestmark = pytest.mark.asyncio(loop_scope="session")

ALICE, BOB = "urn:user:alice", "urn:user:bob"

# As a page without any care for caches would write it.
PULL = """async token => {
  const headers = { Authorization: `Bearer ${token}` };
  const answer = await fetch("/v1/messages?after=0", { headers });
  return (await answer.json()).messages.map(message => message.body);
}"""


async def test_a_user_never_sees_what_another_pulled(serve: Serve, browser: Browser) -> None:
    """Alice signs out and Bob signs in: plain fetch of the same URL, and both heads are 1."""
    instance = await asyncio.to_thread(serve, mailbox="memory://")
    async with instance.async_http("urn:backend", "send") as http:
        for recipient in (ALICE, BOB):
            await http.post("/v1/messages", json={"recipient": recipient, "body": recipient})
    page = await browser.new_page()
    await page.goto(f"{instance.url}/healthz")
    for reader in (ALICE, BOB, ALICE, BOB):
        assert await page.evaluate(PULL, instance.token(reader)) == [reader]
