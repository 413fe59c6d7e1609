"""The browser is real and runs a page's script."""

from playwright.async_api import Browser


async def test_a_page_runs_its_script(chromium: Browser) -> None:
    """A script on a page changes what the page shows."""
    page = await chromium.new_page()
    await page.set_content("<p>no</p><script>document.querySelector('p').textContent=6*7</script>")
    assert await page.inner_text("p") == "42"
