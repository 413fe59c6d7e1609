"""The packages as their users install them: into an empty environment, and into fresh apps."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.async_api import Browser, expect

from tests.js.driving import send
from tests.support import Daemon, Instance, free_port
from tests.support.browser import in_chromium
from tests.support.missing import require
from tests.support.npm import ROOT
from tests.support.serving import JWT_SECRET

HERE = Path(__file__).parent
LIMIT_S = 500.0

pytestmark = [pytest.mark.long, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what it depends on, and nothing else.

    The wheel is built from the source distribution, so that one is complete, too.
    """
    directory = tmp_path_factory.mktemp("wheel")
    uv = Path(sys.executable).with_name("uv")
    run(
        uv,
        "build",
        "--quiet",
        "--no-build-isolation",
        "--python",
        sys.executable,
        "--out-dir",
        directory,
    )
    (wheel,) = directory.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", directory / "env")
    python = directory / "env" / "bin" / "python"
    locked = ["--constraint", str(ROOT / "requirements.lock")]
    run(uv, "pip", "install", "--quiet", "--python", python, *locked, wheel)
    return python


@pytest.fixture(scope="module")
def instance(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """An instance of the installed wheel."""
    # With a PYTHONPATH it is not forked from these tests' own pokebridge.
    env = os.environ | {"POKEBRIDGE_JWT_SECRET": JWT_SECRET, "PYTHONPATH": ""}
    instance = Instance(
        "installed",
        ["--dev", "--mailbox", "sqlite:///mailbox.db"],
        env,
        tmp_path_factory.mktemp("installed"),
        program=[str(python.with_name("pokebridge"))],
    )
    instance.start()
    yield instance
    instance.kill()


@pytest.fixture(scope="module")
def tarball(client_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``npm pack`` makes."""
    directory = tmp_path_factory.mktemp("npm")
    run(
        require("npm"),
        "pack",
        "--ignore-scripts",
        "--pack-destination",
        directory,
        cwd=client_package,
    )
    (tarball,) = directory.glob("*.tgz")
    return tarball


def fresh(app: str, tarball: Path, into: Path) -> Path:
    """A new checkout of an app, with its locked dependencies and the client."""
    npm = require("npm")
    project = into / app
    shutil.copytree(HERE / app, project, ignore=shutil.ignore_patterns("node_modules"))
    if (pages := {"vite": "src", "next": "app"}.get(app)) is not None:
        shutil.copy(HERE / "inbox.tsx", project / pages)
    quietly = ["--silent", "--no-audit", "--no-fund", "--prefer-offline"]
    run(npm, "ci", *quietly, cwd=project)
    run(npm, "install", "--no-save", *quietly, tarball, cwd=project)
    return project


async def test_the_wheel_alone(python: Path, instance: Instance) -> None:
    """Installed with its dependencies it serves, sends, and listens, by command and from code."""
    command = python.with_name("pokebridge")
    env = {"PATH": os.environ["PATH"], "POKEBRIDGE_TOKEN": instance.token("urn:user:bob", "send")}
    assert "pokebridge" in run(command, "--version", env=env)
    run(command, "send", "--url", instance.url, "urn:user:bob", '{"text": "hello"}', env=env)
    code = f"""
import asyncio, os
from pokebridge import PokeClient
async def main():
    got = asyncio.Queue()
    async with PokeClient({instance.url!r}, os.environ["POKEBRIDGE_TOKEN"], got.put):
        print((await got.get())[0].body["text"])
asyncio.run(main())
"""
    assert run(python, "-I", "-c", code, env=env) == "hello\n"


@pytest.mark.parametrize("module", ["receive.mjs", "receive.cjs"])
async def test_plain_node(instance: Instance, tarball: Path, tmp_path: Path, module: str) -> None:
    """An ES module and a CommonJS module send a message, and get it."""
    project = await asyncio.to_thread(fresh, "plain", tarball, tmp_path)
    recipient = f"urn:user:{module}"
    env = {
        "URL": instance.url,
        "TOKEN": instance.token(recipient),
        "SENDER": instance.token("urn:backend", "send"),
        "RECIPIENT": recipient,
    }
    kind = "an ES module" if module.endswith("mjs") else "a CommonJS module"
    got = await asyncio.to_thread(run, require("node"), module, cwd=project, env=env)
    assert got == f"from {kind}\n"


# How each app's built page is served.
SERVERS = {
    "vite": [
        "node_modules/vite/bin/vite.js",
        "preview",
        "--host=127.0.0.1",
        "--strictPort",
        "--port",
    ],
    "next": ["node_modules/next/dist/bin/next", "start", "--hostname=127.0.0.1", "--port"],
}


@in_chromium
@pytest.mark.parametrize("app", SERVERS)
async def test_a_fresh_app(
    instance: Instance, tarball: Path, browser: Browser, tmp_path: Path, app: str
) -> None:
    """In a React and TypeScript app the types are valid, and the built page shows messages."""
    project = await asyncio.to_thread(fresh, app, tarball, tmp_path)
    env = os.environ | {"NEXT_TELEMETRY_DISABLED": "1"}
    await asyncio.to_thread(run, require("npm"), "run", "build", cwd=project, env=env)
    port = free_port()
    server = Daemon(
        app,
        [require("node"), *SERVERS[app], str(port)],
        port=port,
        url=f"http://127.0.0.1:{port}",
        directory=project,
        env=env,
    )
    await asyncio.to_thread(server.start)
    try:
        query = {
            "url": instance.url,
            "token": instance.token(f"urn:user:{app}"),
            "sender": instance.token("urn:backend", "send"),
        }
        page = await browser.new_page()
        await page.goto(f"{server.url}/?{urlencode(query)}")
        await expect(page.locator("output")).to_have_text("connected")
        await send(instance, f"urn:user:{app}", "hello")
        await expect(page.locator("p").last).to_have_text("hello")
        if app == "next":
            await expect(page.locator("p").first).to_have_text("from the server")
    finally:
        await asyncio.to_thread(server.kill)
