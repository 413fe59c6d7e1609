"""The command janitor."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.pubsub_v1 import SubscriberClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from pokebridge.cli.janitor import _lines
from pokebridge.transport.google_pubsub_sweep import Orphan, SweepReport
from tests.cli.conftest import Result, Run
from tests.support import Daemon, Serve
from tests.support.engines import run_pubsub_server

DEAD_AFTER_S = 2.0
IMPATIENT = """
import sys
from pokebridge.cli import main
from pokebridge.transport import google_pubsub
from pokebridge.transport.google_pubsub import GooglePubSubTransport

google_pubsub.ACK_DEADLINE_S = 0
GooglePubSubTransport.sweep.__kwdefaults__["dead_after_s"] = float(sys.argv[1])
main(sys.argv[2:])
"""


def impatient(*args: str) -> Result:
    """The command in a process of its own, with a shorter patience.

    Two seconds unread are enough, not 45; and it does not wait for the ack deadline, which only
    Google's emulator needs.
    """
    command = [sys.executable, "-c", IMPATIENT, str(DEAD_AFTER_S), "janitor", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def subscriptions(address: str, project: str) -> set[str]:
    """What exists in the project, by short name."""
    with grpc.insecure_channel(address) as channel:
        client = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        listed = client.list_subscriptions(project=f"projects/{project}")
        return {found.name.rpartition("/")[2] for found in listed}


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[Daemon]:
    """The package's own Pub/Sub server, which does not feed the dead."""
    with run_pubsub_server(tmp_path) as server:
        yield server


@pytest.fixture
def use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Serve]:
    """``use(address)``: from now on that is Pub/Sub; returns what starts instances on it."""

    def use_it(address: str) -> Serve:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", address)
        serve: Serve = request.getfixturevalue("serve")  # not before: it copies the environment
        return serve

    return use_it


def test_what_a_killed_instance_left_is_deleted(
    small_server: Daemon, use: Callable[[str], Serve]
) -> None:
    """A living instance's and another cluster's stay."""
    serve, project = use(small_server.address), "test"
    own: dict[str, Any] = {"transport": f"pubsub://{project}/pokes", "mailbox": "memory://"}
    serve(instance="living", **own)
    serve(instance="killed", **own).kill()
    serve(instance="elsewhere", cluster="other", **own).kill()

    result = impatient("--transport", own["transport"], "--json")
    report = json.loads(result.out)
    assert (result.status, report["examined"], report["dry_run"]) == (0, 2, False)
    (orphan,) = report["orphans"]
    assert orphan.pop("unread_s") >= DEAD_AFTER_S
    assert orphan == {
        "subscription": f"projects/{project}/subscriptions/poke-sub-killed",
        "instance": "killed",
        "deleted": True,
        "problem": None,
    }
    left = subscriptions(small_server.address, project)
    assert left == {"poke-sub-living", "poke-sub-elsewhere"}


def test_a_dry_run_only_names_it(small_server: Daemon, use: Callable[[str], Serve]) -> None:
    """Of the cluster that was asked for; and nothing is deleted."""
    serve = use(small_server.address)
    own: dict[str, Any] = {"transport": "pubsub://test/pokes", "mailbox": "memory://"}
    serve(instance="living", **own)
    serve(instance="killed", cluster="blue", **own).kill()
    assert impatient("--transport", own["transport"]).out == "1 examined, 0 that nobody reads\n"

    result = impatient("--transport", own["transport"], "--cluster", "blue", "--dry-run")
    first, second = result.out.splitlines()
    assert (result.status, first) == (0, "1 examined, 1 that nobody reads")
    assert second.startswith("would be deleted: poke-sub-killed (unread for ")
    assert subscriptions(small_server.address, "test") == {"poke-sub-living", "poke-sub-killed"}


@pytest.mark.parametrize("scheme", ["nats", "tls", "redis", "rediss", "memory"])
def test_other_transports_keep_nothing(run: Run, tmp_path: Path, scheme: str) -> None:
    """It says so without connecting; the URL, which may hold a password, is not shown."""
    config = tmp_path / "pokebridge.toml"
    config.write_text(f'transport = "{scheme}://me:s3cret@127.0.0.1:1"\n')
    result = run("janitor", "--config", str(config))
    line = f"nothing to do: {scheme}:// keeps no subscriptions of dead instances\n"
    assert result == (0, line, "")
    result = run("janitor", "--json", "--config", str(config))
    assert result.status == 0
    assert json.loads(result.out) == {"examined": 0, "orphans": [], "dry_run": False}


def test_it_creates_nothing(
    small_server: Daemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic that is not there is one line, and is not there afterwards."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", small_server.address)
    for _ in range(2):
        result = run("janitor", "--transport", "pubsub://a-project/no-topic")
        line = "projects/a-project/topics/no-topic does not exist"
        assert (result.status, result.out) == (2, "")
        assert line in result.err
        assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "status", "text"),
    [
        ("carrier-pigeon://loft", 2, "--transport"),
        ("pubsub://a-project/!", 2, "topic"),
        ("pubsub://a-project/topic", 1, "127.0.0.1:1 is unreachable"),
    ],
)
def test_what_can_not_be_swept_is_one_line(run: Run, url: str, status: int, text: str) -> None:
    """A wrong URL is status 2, an engine that is not there status 1."""
    result = run("janitor", "--transport", url, PUBSUB_EMULATOR_HOST="127.0.0.1:1")
    assert (result.status, result.out) == (status, "")
    assert text in result.err.lower()
    assert result.err.count("\n") == 1


def test_what_can_not_be_deleted_is_said() -> None:
    """It is reported with the reason, and the other subscriptions are deleted."""
    orphans = (
        Orphan("projects/p/subscriptions/poke-sub-a", "a", 45.4, deleted=True),
        Orphan("projects/p/subscriptions/poke-sub-b", "b", 61.0, deleted=False, problem="denied"),
    )
    assert list(_lines(SweepReport(3, orphans, dry_run=False))) == [
        "3 examined, 2 that nobody reads",
        "deleted: poke-sub-a (unread for 45 s)",
        "not deleted, denied: poke-sub-b (unread for 61 s)",
    ]
