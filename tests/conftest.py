"""Brings the fixtures of ``tests.support``, and the servers' logs into the report of a failure."""

import os
import signal
from collections.abc import Generator

# Set before grpc is imported. Otherwise grpc writes to the standard error of tested programs.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import pytest
from hypothesis import settings

from tests.support import daemon, environment
from tests.support.blocking import no_blocking_calls
from tests.support.browser import browser, browsers
from tests.support.engines import (
    nats_server,
    own_nats_server,
    own_postgres_server,
    own_pubsub_emulator,
    own_valkey_server,
    postgres_database,
    postgres_server,
    pubsub_emulator,
    valkey_server,
)
from tests.support.logs import restored_logging
from tests.support.mute import names
from tests.support.npm import client_package
from tests.support.serving import serve
from tests.support.silence import silence

__all__ = [
    "browser",
    "browsers",
    "client_package",
    "names",
    "nats_server",
    "no_blocking_calls",
    "own_nats_server",
    "own_postgres_server",
    "own_pubsub_emulator",
    "own_valkey_server",
    "postgres_database",
    "postgres_server",
    "pubsub_emulator",
    "restored_logging",
    "serve",
    "silence",
    "valkey_server",
]


environment.clean()

# A shell's background job ignores SIGINT, and so would every program that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast a busy machine runs an example proves nothing. CI judges a change, so it tries the same
# examples each time.
settings.register_profile("suite", deadline=None, derandomize=environment.in_ci())
settings.load_profile("suite")


# The slowest files, the slowest first. A missing or needless entry only costs time.
LONGEST = (
    "simulation/test_bugs.py",
    "engines/test_mute_hosts.py",
    "simulation/test_seeds.py",
    "ingress/test_ingress.py",
    "transport/test_google_pubsub.py",
    "console/test_console.py",
    "cluster/test_fanout.py",
    "cluster/test_deaf.py",
    "benchmarks/test_measures.py",
    "cluster/test_trouble.py",
    "deploy/test_proxies.py",
    "js/test_package.py",
    "workers/test_served.py",
    "server/test_verification.py",
    "compat/test_rolling_upgrade.py",
    "console/test_playground.py",
    "coordination/test_nats.py",
    "coordination/test_redis.py",
    "cluster/test_neighbours.py",
    "examples/test_replicache.py",
    "js/test_faults.py",
    "client/test_between.py",
    "transport/test_google_pubsub_topics.py",
    "js/test_scenarios.py",
    "cluster/test_partitioned.py",
    "transport/test_nats.py",
    "server/test_acks.py",
    "transport/test_google_pubsub_sweep.py",
    "coordination/test_postgres.py",
    "engines/test_pgbouncer.py",
    "server/test_roles.py",
    "mailbox/test_postgres.py",
    "cli/test_janitor.py",
    "cli/test_storm.py",
    "transport/test_redis.py",
    "cluster/test_disconnects.py",
    "mailbox/test_restores.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, lest one process be left with them when the others are done."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(LONGEST)))


log_sizes = pytest.StashKey[dict[daemon.Daemon, int]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note where the logs of the shared servers stand, for the report tells what came after."""
    item.stash[log_sizes] = {server: len(server.log()) for server in daemon.alive}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers had to say during a test that failed."""
    report = yield
    if report.failed:
        for server in sorted(daemon.alive, key=lambda server: server.name):
            if said := server.log_tail(since=item.stash[log_sizes].get(server, 0)):
                report.sections.append((f"log of {server.name} ({server.address})", said))
    return report
