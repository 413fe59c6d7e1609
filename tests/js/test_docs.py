"""What the documentation shows of the JavaScript client, and the examples, run as they stand.

They get messages of the form that the README sends.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from playwright.async_api import BrowserContext, Page, expect

from tests.js.driving import HERE, TIMEOUT_S, poke, send, wait_sessions
from tests.support import Instance
from tests.support.missing import require
from tests.support.npm import CLIENT, ROOT

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOCUMENTS = [ROOT / "docs" / "javascript.md", CLIENT / "README.md"]
BRIDGE = "https://bridge.example.org"
TSCONFIG = {
    "compilerOptions": {
        "module": "nodenext",
        "target": "es2022",
        "lib": ["es2022", "dom"],
        "jsx": "react-jsx",
        "types": ["node"],
        "strict": True,
        "allowJs": True,
        "noEmit": True,
    },
    "include": ["globals.d.ts", "snippet-*.mts", "Inbox.jsx", "Document.jsx"],
}
OWN_DATA = "https://api.example.org/todos"


def snippets(language: str) -> list[str]:
    """The fenced blocks of ``language``."""
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path, client_package: Path) -> Path:
    """A project of a user's, with the client and its peers installed."""
    modules = tmp_path / "node_modules"
    (modules / "@pokebridge").mkdir(parents=True)
    (modules / "@pokebridge" / "client").symlink_to(client_package)
    for peer in ("react", "react-dom", "scheduler", "ws"):
        (modules / peer).symlink_to(client_package / "node_modules" / peer)
    shutil.copy(HERE / "prelude.mjs", tmp_path)
    return tmp_path


@asynccontextmanager
async def running(*command: str | Path, **env: str) -> AsyncIterator[Process]:
    """A Node process."""
    process = await asyncio.create_subprocess_exec(
        require("node"), *command, stdout=PIPE, env=os.environ | env
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def line_with(process: Process, text: str) -> str:
    """The next line of its output that has ``text`` in it."""
    assert process.stdout is not None
    seen = ""
    async with asyncio.timeout(TIMEOUT_S):
        while line := (await process.stdout.readline()).decode():
            if text in line:
                return line
            seen += line
    raise AssertionError(f"no {text!r} in {seen!r}")


def bundle(source: Path, project: Path) -> Path:
    """One script of a React application."""
    esbuild = CLIENT / "node_modules" / ".bin" / "esbuild"
    out = project / "bundle.js"
    flags = ["--bundle", "--jsx=automatic", f"--outfile={out}", "--log-level=warning"]
    subprocess.run([esbuild, source, *flags], check=True, cwd=project)
    return out


async def test_snippets(project: Path, instance: Instance) -> None:
    """Every module of the documents connects, and shows a message or pulls by itself."""

    async def run(number: int, snippet: str) -> None:
        recipient = f"urn:user:reader-{number}"
        source = project / f"snippet-{number}.mjs"
        source.write_text(
            snippet.replace(BRIDGE, instance.url).replace(OWN_DATA, f"{instance.url}/healthz")
        )
        await send(instance, recipient, {"text": "hello"})
        prelude = f"--import={(project / 'prelude.mjs').as_uri()}"
        env = {"BRIDGE": instance.url, "RECIPIENT": recipient}
        async with running(prelude, source, **env) as process:
            expected = '{"text":"hello"}' if "onMessages" in snippet else ""
            await line_with(process, f"shown: {expected}")

    modules = snippets("js")
    assert len(modules) == 8
    await asyncio.gather(*(run(number, snippet) for number, snippet in enumerate(modules)))


GLOBALS = """
declare function getToken(recipient?: string): Promise<string>;
declare function show(what: unknown): void;
"""


async def test_snippets_have_types(project: Path, client_package: Path) -> None:
    """Every snippet compiles in a strict TypeScript project."""
    installed = client_package / "node_modules"
    (project / "node_modules" / "@types").symlink_to(installed / "@types")
    (project / "node_modules" / "csstype").symlink_to(installed / "csstype")
    (project / "globals.d.ts").write_text(GLOBALS)
    for number, snippet in enumerate(snippets("js")):
        (project / f"snippet-{number}.mts").write_text(snippet)
    for name, component in zip(("Inbox", "Document"), snippets("jsx"), strict=True):
        (project / f"{name}.jsx").write_text(component)
    (project / "tsconfig.json").write_text(json.dumps(TSCONFIG))
    tsc = installed / ".bin" / "tsc"
    process = await asyncio.create_subprocess_exec(tsc, cwd=project, stdout=PIPE)
    problems, _ = await process.communicate()
    assert problems.decode() == ""


async def open_with_token(context: BrowserContext, url: str, token: str) -> Page:
    """A page in which ``getToken`` is defined."""
    page = await context.new_page()
    await page.add_init_script(f"globalThis.getToken = async () => {json.dumps(token)}")
    await page.goto(url)
    return page


async def test_the_hook(
    context: BrowserContext, site: str, instance: Instance, project: Path
) -> None:
    """The component of the documents shows what comes, in React's strict mode."""
    component, _ = snippets("jsx")
    (project / "Inbox.jsx").write_text(component.replace(BRIDGE, instance.url))
    (project / "main.jsx").write_text(
        """import { StrictMode } from "react";
        import { createRoot } from "react-dom/client";
        import { Inbox } from "./Inbox.jsx";
        createRoot(document.body).render(
          <StrictMode><Inbox user="ann" getToken={getToken} /></StrictMode>,
        );"""
    )
    token = instance.token("urn:user:react")
    page = await open_with_token(context, f"{site}/tests/js/page.html", token)
    await page.add_script_tag(path=bundle(project / "main.jsx", project))
    await expect(page.locator("output")).to_have_text("connected")
    await send(instance, "urn:user:react", {"text": "one"}, {"text": "two"})
    await expect(page.locator("p")).to_have_text(["one", "two"])


async def test_the_hook_that_listens(
    context: BrowserContext, site: str, instance: Instance, project: Path
) -> None:
    """The other component is told of each poke for the document, in React's strict mode."""
    _, component = snippets("jsx")
    (project / "Document.jsx").write_text(component.replace(BRIDGE, instance.url))
    tokens = {who: instance.token(who) for who in ("urn:user:react-2", "urn:doc:react")}
    (project / "main.jsx").write_text(
        f"""import {{ StrictMode }} from "react";
        import {{ createRoot }} from "react-dom/client";
        import {{ Document }} from "./Document.jsx";
        const tokens = {json.dumps(tokens)};
        const getToken = async (id = "urn:user:react-2") => tokens[id];
        createRoot(document.body).render(
          <StrictMode><Document user="ann" id="urn:doc:react" getToken={{getToken}} /></StrictMode>,
        );"""
    )
    page = await open_with_token(context, f"{site}/tests/js/page.html", "")
    await page.add_script_tag(path=bundle(project / "main.jsx", project))
    output = page.locator("output")
    await expect(output).to_have_text(re.compile("connected: version [1-9]"))
    before = await output.text_content()
    await poke(instance, "urn:doc:react")
    await expect(output).not_to_have_text(before or "")
    await expect(output).to_have_text(re.compile("connected: version [1-9]"))


async def test_the_page_without_a_build(
    context: BrowserContext, site: str, instance: Instance
) -> None:
    """The page of the docs works with the one file that it needs."""
    (html,) = snippets("html")
    token = instance.token("urn:user:plain")
    page = await open_with_token(context, f"{site}/clients/js/dist/", token)
    await page.set_content(html.replace(BRIDGE, instance.url))
    await send(instance, "urn:user:plain", {"text": "hello"})
    await expect(page.locator("ul")).to_have_text("hello")


async def test_the_example_page(context: BrowserContext, site: str, instance: Instance) -> None:
    """Two users send each other messages."""
    pages = {user: await context.new_page() for user in ("zoe", "yan")}
    for user, page in pages.items():
        await page.goto(f"{site}/examples/page/?bridge={instance.url}&user={user}")
        await expect(page.locator("#state")).to_have_text("connected")
    for sender, recipient in (("zoe", "yan"), ("yan", "zoe")):
        await pages[sender].bring_to_front()  # Chromium is slow to draw what is hidden
        await pages[sender].get_by_label("To").fill(recipient)
        await pages[sender].get_by_label("say").fill(f"from {sender}")
        await pages[sender].get_by_role("button").click()
        shown = pages[recipient].locator("#messages li")
        await expect(shown).to_have_text([re.compile(rf"{sender}: from {sender}")])


async def test_the_react_example(
    context: BrowserContext, site: str, instance: Instance, project: Path
) -> None:
    """A new user gets a new connection, and without a user there is none."""
    shutil.copytree(ROOT / "examples" / "react" / "src", project / "src")
    page = await context.new_page()
    await page.goto(f"{site}/tests/js/page.html?bridge={instance.url}")
    await page.evaluate("document.body.innerHTML = '<div id=root></div>'")
    await wait_sessions(instance, 0)
    await page.add_script_tag(path=bundle(project / "src" / "main.jsx", project))
    for user in ("bob", "alice"):
        await page.locator("select").select_option(user)
        await expect(page.locator("output")).to_have_text("connected")
        await send(instance, f"urn:user:{user}", {"text": f"for {user}"})
        # Other examples send to the same users.
        await expect(page.locator("li").last).to_have_text(f"urn:backend: for {user}")
        await wait_sessions(instance, 1)
    await page.locator("select").select_option("")
    await expect(page.locator("output")).to_have_text("closed")
    await wait_sessions(instance, 0)


async def test_the_node_worker(project: Path, instance: Instance) -> None:
    """A job is done and answered; asked to stop, the worker ends by itself."""
    worker = shutil.copy(ROOT / "examples" / "node-worker" / "worker.mjs", project)
    async with (
        running(worker, BRIDGE=instance.url, WORKER="urn:worker:test") as process,
        instance.async_http("urn:user:boss", "send") as http,
    ):
        await line_with(process, "connected")
        await send(instance, "urn:worker:test", {"numbers": "none"}, "no job")
        job = {"recipient": "urn:worker:test", "body": {"numbers": [1, 2, 3]}}
        (await http.post("/v1/messages", json=job)).raise_for_status()
        await line_with(process, "1 + 2 + 3 = 6")
        answers = (await http.get("/v1/messages")).json()["messages"]
        assert [answer["body"] for answer in answers] == [{"sum": 6}]
        process.terminate()
        async with asyncio.timeout(TIMEOUT_S):
            assert await process.wait() == 0
