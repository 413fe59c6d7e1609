"""The page and the console, used by scripts alone, so that any browser's driver will do."""

import json
from typing import Any, Protocol

from tests.support import wait_until


class Tab(Protocol):
    """A page of a browser: Playwright's, or :class:`~tests.support.webkit.WebKit`."""

    async def goto(self, url: str, /) -> Any:
        """Open a page, and return when it has loaded."""

    async def evaluate(self, expression: str, /) -> Any:
        """The value of a JavaScript expression, awaited."""


async def wait_for(tab: Tab, expression: str) -> None:
    """Wait until a JavaScript expression is true."""
    await wait_until(lambda: tab.evaluate(f"!!({expression})"), what=expression)


async def wait_for_text(tab: Tab, selector: str, text: str) -> None:
    """Wait until an element's text is there."""
    await wait_for(
        tab, f"document.querySelector({selector!r})?.textContent.includes({json.dumps(text)})"
    )


async def open_playground(tab: Tab, url: str) -> None:
    """Open the page, and wait until both users are connected."""
    await tab.goto(url)
    await wait_for(tab, "document.querySelectorAll('[data-state=ready]').length === 2")


async def send_message(tab: Tab, side: str, text: str) -> None:
    """Let the user on this side send ``text``, and wait until the other one shows it."""
    await tab.evaluate(
        f"""(() => {{
          const input = document.querySelector('[data-user={side}] .text');
          input.value = {json.dumps(text)};
          input.form.requestSubmit();
        }})()"""
    )
    other = {"left": "right", "right": "left"}[side]
    await wait_for_text(tab, f"[data-user={other}] .message.theirs:last-child .body", text)


async def open_console(tab: Tab, url: str) -> None:
    """Sign in with a development token, and wait until the console is live."""
    await tab.goto(f"{url}/console")
    await wait_for(tab, "!document.querySelector('.dev-token').hidden")
    await tab.evaluate("document.querySelector('.dev-token').click()")
    await wait_for_text(tab, ".live", "live")
    await wait_for(tab, "document.querySelectorAll('figure canvas').length === 4")


async def look_up(tab: Tab, recipient: str) -> None:
    """Ask the console for a recipient, and wait for what it finds."""
    await tab.evaluate(
        f"""(() => {{
          const input = document.querySelector('#recipient');
          input.value = {json.dumps(recipient)};
          input.form.requestSubmit();
        }})()"""
    )
    await wait_for_text(tab, ".look-up .found", "The newest version is")


async def sticks_out_px(tab: Tab) -> int:
    """How much wider than the window the page is."""
    return int(await tab.evaluate("document.documentElement.scrollWidth - innerWidth"))
