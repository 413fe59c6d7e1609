"""The command serve, as an operator starts and stops it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect

from pokebridge.settings import Settings, groups
from tests.cli.conftest import Run
from tests.support import block_until, free_port, wait_until
from tests.support.serving import JWT_SECRET, POKEBRIDGE, Serve


def test_a_configured_instance_serves_and_stops(tmp_path: Path) -> None:
    """Settings from the file reach it; SIGTERM ends it with status 0; the log is JSON."""
    port = free_port()
    config = tmp_path / "pokebridge.toml"
    config.write_text(
        f'port = {port}\njwt_secret = "{JWT_SECRET}"\ninstance = "blue"\ndrain_s = 0\n'
        'mailbox = "sqlite:///here.db"\n'
    )
    process = subprocess.Popen(
        [POKEBRIDGE, "serve", "--config", config],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        block_until(lambda: _answers(url), timeout_s=30)
        assert httpx.post(f"{url}/v1/dev/token", json={"sub": "bob"}).status_code == 404
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert (tmp_path / "here.db").exists()
    lines = [json.loads(line) for line in err.splitlines()]
    assert any(line.get("url") == url for line in lines)
    assert JWT_SECRET not in err


def test_every_setting_but_the_secrets_has_a_flag(run: Run) -> None:
    """Secrets have no flags, because other users can read a command line."""
    shown = run("serve", "--help").out
    for name in Settings.model_fields:
        has_flag = f" --{name.replace('_', '-')} " in shown
        assert has_flag == (
            name not in {"jwt_secret", "jwt_previous_secret", "push_webhook_secret"}
        )


@pytest.mark.parametrize(
    "flags",
    [["--jwks-url", "https://issuer.example/jwks"], ["--push-webhook-url", "https://push.example"]],
)
def test_a_proxy_that_can_not_be_used_is_one_line(run_process: Run, flags: list[str]) -> None:
    """The start ends with the name of the variable, and shows nothing of its password."""
    environ = {
        "POKEBRIDGE_JWT_SECRET": JWT_SECRET,
        "POKEBRIDGE_PUSH_WEBHOOK_SECRET": f"whsec_{'QUJD' * 10}",
        "POKEBRIDGE_MAILBOX": "memory://",
        "https_proxy": "socks5://hunter2@proxy.example:1080",
    }
    result = run_process("serve", "--port", "0", *flags, **environ)
    assert (result.status, result.out) == (2, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("pokebridge: https_proxy: SOCKS proxies are not supported")
    assert "Traceback" not in result.err
    assert "hunter2" not in result.err


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


async def test_a_second_ctrl_c_does_not_wait_for_the_drain(serve: Serve) -> None:
    """The first one spreads the closing of the sessions, here over an hour."""
    instance = serve("--drain-s", "3600", mailbox="memory://")
    headers = instance.headers("bob")
    async with (
        connect(instance.ws_url, additional_headers=headers) as one,
        connect(instance.ws_url, additional_headers=headers) as other,
    ):
        for socket in (one, other):
            assert json.loads(await socket.recv())["type"] == "ready"
        os.kill(instance.pid, signal.SIGINT)
        async with instance.async_http() as http:
            while (await http.get("/readyz")).is_success:
                pass
        os.kill(instance.pid, signal.SIGINT)
        await wait_until(lambda: not instance.is_running(), 60)


def test_the_settings_are_shown_in_groups(run: Run) -> None:
    """Each flag stands once, below the title of its group in docs/settings.md."""
    shown = run("serve", "--help").out
    titles = [*groups(), "Other options"]
    assert re.findall(r"^(\S.*):$", shown, re.MULTILINE) == titles
    flags = re.findall(r"^  --([a-z-]+)", shown, re.MULTILINE)
    named = [name.replace("_", "-") for names in groups().values() for name in names]
    secret = {"jwt-secret", "jwt-previous-secret", "push-webhook-secret"}
    assert [flag for flag in flags if flag != "config"] == [n for n in named if n not in secret]


@pytest.mark.parametrize(("typed", "completed"), [("ses", "sessions"), ("dis", "disconnect")])
def test_the_shell_completes(typed: str, completed: str) -> None:
    """As docs/operating.md has it: the shell asks the command itself."""
    asked = {"_POKEBRIDGE_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    env = os.environ | asked | {"COMP_WORDS": f"pokebridge {typed}"}
    told = subprocess.run([POKEBRIDGE], env=env, capture_output=True, text=True, check=False)
    assert told.stdout == f"plain,{completed}\n"
