"""``make site``: the pages as a site that needs nothing but its own files."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.async_api import Browser, Request, expect

from tests.docs.blocks import ROOT
from tests.support.browser import in_chromium

BUILDER = Path(sys.executable).with_name("sphinx-build")
# URLs that a browser fetches by itself, without a click.
FETCHED = {
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("link", "href"),
    ("source", "src"),
}
IN_STYLES = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


def build(source: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Build ``source`` as the Makefile builds the checkout."""
    makefile = (ROOT / "Makefile").read_text()
    (flags,) = re.findall(r"sphinx-build (.*) \. dist/site$", makefile, re.MULTILINE)
    command = [BUILDER, *flags.split(), "--doctree-dir", into / "cache", source, into / "site"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning, like one of a broken link, is an error."""
    folder = tmp_path_factory.mktemp("docs")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


class _Page(HTMLParser):
    """What a page fetches, links to, and can be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the element names."""
        for name, value in attrs:
            if value is None:
                continue
            if (tag, name) in FETCHED:
                self.fetched.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif name == "id":
                self.ids.add(value)


def _is_foreign(url: str) -> bool:
    return bool(urlsplit(url).netloc)


def test_every_link_and_asset_is_in_the_site(site: Path) -> None:
    """No page or style fetches from another host, and whatever each names is there."""
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 40
    problems = []
    for path, page in pages.items():
        problems += [f"{path.name} fetches {url}" for url in page.fetched if _is_foreign(url)]
        for url in (*page.fetched, *page.links):
            target = urlsplit(url)
            if target.scheme or target.netloc or not url.strip("#"):
                continue
            named = (path.parent / unquote(target.path)).resolve() if target.path else path
            anchors = pages[named].ids if target.fragment and named in pages else {target.fragment}
            if not named.exists() or unquote(target.fragment) not in anchors:
                problems.append(f"{path.name} leads to {url}")
    for path in site.rglob("*.css"):
        for url in (match[1] or match[2] for match in IN_STYLES.finditer(path.read_text())):
            if _is_foreign(url):
                problems.append(f"{path.name} fetches {url}")
    assert not problems


@in_chromium
@pytest.mark.asyncio(loop_scope="session")
async def test_search_works_without_a_network(site: Path, browser: Browser) -> None:
    """From the folder, without a server: a search finds a page, and no page asks another host."""
    page = await browser.new_page()
    foreign: list[str] = []

    def note(request: Request) -> None:
        if not request.url.startswith(("file:", "data:")):
            foreign.append(request.url)

    page.on("request", note)
    await page.goto((site / "index.html").as_uri())
    captions = page.locator(".sidebar-tree .caption-text")
    await expect(captions).to_have_text(["First hour", "Use", "Operate", "Understand", "Reference"])
    await page.locator("input[name=q]").fill("verify_every_s")
    await page.locator("input[name=q]").press("Enter")
    await expect(page.locator("#search-results a").first).to_be_visible()
    assert not foreign


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    """A page that leads nowhere, or to a heading that is not there, is named."""
    missing = "nowhere.md"
    page = f"# One page\n\n[no page]({missing}) and [no heading](#nowhere-either)\n"
    (tmp_path / "README.md").write_text(page)
    done = build(tmp_path, tmp_path / "built")
    assert done.returncode != 0
    assert f"'{missing}'" in done.stderr
    assert "'nowhere-either'" in done.stderr
