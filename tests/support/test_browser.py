"""The browsers are real and run a page's script."""

import pytest
from playwright.async_api import Browser

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_page_runs_its_script(browser: Browser) -> None:
    """A script on a page changes what the page shows."""
    page = await browser.new_page()
    await page.set_content("<p>no</p><script>document.querySelector('p').textContent=6*7</script>")
    assert await page.inner_text("p") == "42"
