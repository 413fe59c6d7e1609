"""A client that listens to more than its own recipient, in a browser and in Node."""

import json
from typing import Any

import pytest
from playwright.async_api import BrowserContext

from tests.js.driving import TIMEOUT_S, Client, open_pages, send, sessions, wait_sessions
from tests.support import Instance, wait_until

pytestmark = pytest.mark.asyncio(loop_scope="session")

_OF = "harness.listening[{}]"


async def listen(client: Client, recipient: str, *of_another: str) -> None:
    """Begin to listen."""
    await client.evaluate(f"void harness.listen(...{json.dumps([recipient, *of_another])})")


async def wait_listening(client: Client, recipient: str, state: str = "connected") -> None:
    """Wait until things stand so."""
    expression = f"{_OF.format(json.dumps(recipient))}.listening.state"

    async def is_so() -> bool:
        return bool(await client.evaluate(expression) == state)

    await wait_until(is_so, TIMEOUT_S, f"{recipient} being {state}")


async def wait_heard(client: Client, recipient: str, *bodies: Any) -> None:
    """Wait until exactly this has come for the recipient."""
    expression = f"{_OF.format(json.dumps(recipient))}.shown"

    async def is_so() -> bool:
        return bool(await client.evaluate(expression) == list(bodies))

    await wait_until(is_so, TIMEOUT_S, f"{bodies} of {recipient}")


@pytest.mark.parametrize("transport", ["websocket", "poll"])
async def test_one_socket_brings_all_that_a_client_listens_to(
    client: Client, instance: Instance, transport: str, request: pytest.FixtureRequest
) -> None:
    """Each with its own token and cursor, until it is closed; one refusal ends nothing else."""
    await wait_sessions(instance, 0)
    name = request.node.callspec.id
    user, doc, team = (f"urn:{kind}:{name}" for kind in ("user", "doc", "team"))
    await client.start(instance.url, user, transport=transport)
    await listen(client, doc)
    await listen(client, team, user)
    await wait_listening(client, doc)
    await wait_listening(client, team, "stopped")
    await send(instance, doc, "of the doc")
    await wait_heard(client, doc, "of the doc")
    await send(instance, user, "of the user")
    await client.wait_shown("of the user")
    assert await sessions(instance) == 1
    await client.evaluate(f"{_OF.format(json.dumps(doc))}.listening.close()")
    await send(instance, doc, "unheard")
    await send(instance, user, "heard")
    await client.wait_shown("of the user", "heard")
    await wait_heard(client, doc, "of the doc")
    await client.close()
    await wait_sessions(instance, 0)


async def test_tabs_share_what_they_listen_to(
    context: BrowserContext, site: str, instance: Instance
) -> None:
    """All over the leading tab's socket, and over that of the tab which leads after it."""
    await wait_sessions(instance, 0)
    clients = [Client(tab) for tab in await open_pages(context, site, 2)]
    for client in clients:
        await client.start(instance.url, "urn:user:listening-tabs")
    for client, recipients in zip(
        clients, (["urn:doc:1", "urn:doc:2"], ["urn:doc:2", "urn:doc:3"]), strict=True
    ):
        for recipient in recipients:
            await listen(client, recipient)
            await wait_listening(client, recipient)
    assert await sessions(instance) == 1
    for recipient in ("urn:doc:1", "urn:doc:2", "urn:doc:3"):
        await send(instance, recipient, recipient)
    first, second = clients
    await wait_heard(first, "urn:doc:1", "urn:doc:1")
    for client in clients:
        await wait_heard(client, "urn:doc:2", "urn:doc:2")
    await wait_heard(second, "urn:doc:3", "urn:doc:3")
    await first.close()
    await wait_sessions(instance, 1)
    for recipient in ("urn:doc:2", "urn:doc:3"):
        await wait_listening(second, recipient)
        await send(instance, recipient, "on")
        await wait_heard(second, recipient, recipient, "on")
    await second.close()
    await wait_sessions(instance, 0)
