"""`pokebridge serve --workers 2`: one instance on one port, whose workers may be killed."""

import asyncio
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from time import monotonic

import httpx
import psutil
import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from tests.cluster.clusters import run_command
from tests.cluster.crowd import Act, Crowd
from tests.support.serving import Instance, Serve
from tests.support.waiting import block_until, wait_until

# How long others may be silent when a worker is killed. On an idle machine it is 0.5 s.
SILENCE_S = 30.0  # otherwise verification may have replaced a lost poke


def metrics_of(instance: Instance) -> dict[str, float]:
    """The metrics, by name and labels."""
    with instance.http() as http:
        lines = http.get("/metrics").raise_for_status().text.splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def workers_of(instance: Instance) -> list[dict[str, int]]:
    """The workers as the cluster view shows them."""
    with instance.http("urn:admin", "admin") as http:
        (member,) = http.get("/v1/cluster").raise_for_status().json()["instances"]
    return member["workers"]  # type: ignore[no-any-return]


async def kill_one_of(instance: Instance, crowd: Crowd) -> Act:
    """Kill a worker and wait until another serves and traffic flows; says who was struck."""
    before = {client.recipient: len(client.ready_s) for client in crowd.clients}
    pids, began_s, sent = instance.worker_pids(), monotonic(), len(crowd.sent)
    victim = random.choice(pids)
    os.kill(victim, signal.SIGKILL)
    await wait_until(lambda: len({*instance.worker_pids()} - {victim}) == len(pids))
    await wait_until(lambda: len(crowd.sent) > sent + 10)
    # Not that they are back: a client that loses its socket often waits longer each time.
    struck = frozenset(
        client.recipient
        for client in crowd.clients
        if not client.ready or len(client.ready_s) > before[client.recipient]
    )
    return Act("a worker is killed", began_s, struck)


async def _kill_workers(instance: Instance, kills: int) -> tuple[float, Counter[str]]:
    """Kill workers under traffic. Returns the longest silence of others, and who was struck."""
    silence_s, struck = 0.0, Counter[str]()
    async with Crowd(instance.url, instance.token, 40) as crowd:
        for _ in range(kills):
            act = await kill_one_of(instance, crowd)
            struck.update(act.struck)
            silence_s = max(silence_s, crowd.longest_silence_s(act, monotonic(), struck=False))
        await crowd.stop_sending()
        await wait_until(lambda: crowd.outstanding == 0, 120, "all that was accepted is pulled")
        assert len(crowd.sent) > kills  # without those that the killed worker did not answer
    return silence_s, struck


async def test_a_killed_worker_is_replaced_and_nothing_is_lost(serve: Serve) -> None:
    """After two kills under traffic its clients return and pull everything. Others continue."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="sqlite:///m.db")
    silence_s, struck = await _kill_workers(instance, 2)
    assert silence_s <= SILENCE_S
    assert struck
    metrics = await asyncio.to_thread(metrics_of, instance)
    starts = [metrics[f'pokebridge_worker_starts_total{{worker="{number}"}}'] for number in (1, 2)]
    assert sum(starts) == 2 + 2
    assert await asyncio.to_thread(instance.terminate) == 0
    assert "database is locked" not in instance.log()


@pytest.mark.long
async def test_fifty_killed_workers(serve: Serve) -> None:
    """Fifty kills: nothing is lost, and the others are never silent for long."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="sqlite:///m.db")
    silence_s, struck = await _kill_workers(instance, 50)
    print(f"\nlongest silence of the others: {silence_s:.2f} s")  # noqa: T201 - it is a result
    assert silence_s <= SILENCE_S
    assert len(struck) == 40, "everybody was struck now and then"


async def test_one_port_one_instance(serve: Serve) -> None:
    """Sockets are spread evenly, may listen to a room, and are shown as a sum, and by worker."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="memory://", max_sessions=20)
    sockets: list[ClientConnection] = []
    async with AsyncExitStack() as stack:
        for number in range(20):
            headers = instance.headers(f"urn:user:{number}")
            connect = websockets.connect(instance.ws_url, additional_headers=headers)
            socket = await stack.enter_async_context(connect)
            assert '"ready"' in str(await socket.recv())
            sockets.append(socket)
        with pytest.raises(websockets.InvalidStatus, match="503"):
            await websockets.connect(instance.ws_url, additional_headers=headers)

        view = await asyncio.to_thread(workers_of, instance)
        assert sum(worker["sessions"] for worker in view) == 20
        metrics = await asyncio.to_thread(metrics_of, instance)
        each = [metrics[f'pokebridge_worker_sessions{{worker="{number}"}}'] for number in (1, 2)]
        assert metrics["pokebridge_sessions"] == sum(each) == 20
        assert min(each) >= 8, "evenly, apart from the connections of plain HTTP"
        assert metrics['pokebridge_handshakes_total{status="101"}'] == 20
        for number in (1, 2):
            assert metrics[f'pokebridge_worker_cpu_seconds_total{{worker="{number}"}}'] > 0
            assert metrics[f'pokebridge_worker_starts_total{{worker="{number}"}}'] == 1
        shown = await asyncio.to_thread(run_command, instance, "cluster", "status")
        assert f"20 ({each[0]:.0f}+{each[1]:.0f})" in shown.stdout
        await _listen_to_a_room(instance, sockets)
    assert "worker=1" in instance.log()


async def _listen_to_a_room(instance: Instance, sockets: Sequence[ClientConnection]) -> None:
    """What is published once reaches whoever listens, on both workers, until it listens no more."""
    room, told = "urn:group:1", {"type": "poke", "recipient": "urn:group:1"}
    listen = {"type": "listen", "recipient": room, "token": instance.token(room)}
    unlisten = {"type": "unlisten", "recipient": room}
    for socket in sockets:
        await socket.send(json.dumps(listen))
    for socket in sockets:
        assert json.loads(await socket.recv())["type"] == "listening"
    async with instance.async_http("urn:backend", "poke") as http:
        for hearing in (sockets, sockets[::2]):
            (await http.post("/v1/pokes", json={"recipient": room})).raise_for_status()
            for socket in hearing:
                assert json.loads(await socket.recv()) == told
            for socket in sockets[1::2]:
                await socket.send(json.dumps(unlisten))
                await socket.send(json.dumps({"type": "ping"}))
                assert json.loads(await socket.recv()) == {"type": "pong"}


async def test_many_senders_share_the_file_of_one_writer(serve: Serve) -> None:
    """200 messages at once through two workers: dense versions, and no lock is in the way."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="sqlite:///m.db")

    async def send(number: int) -> int:
        async with instance.async_http("urn:backend", "send") as http:
            sent = [
                await http.post("/v1/messages", json={"recipient": "urn:user:bob", "body": number})
                for _ in range(10)
            ]
        return sum(each.status_code == httpx.codes.ACCEPTED for each in sent)

    assert sum(await asyncio.gather(*map(send, range(20)))) == 200
    async with instance.async_http("urn:user:bob") as http:
        page = (await http.get("/v1/messages", params={"limit": 500})).json()
    assert [message["version"] for message in page["messages"]] == list(range(1, 201))
    view = await asyncio.to_thread(metrics_of, instance)
    assert view["pokebridge_messages_committed_total"] == 200


async def test_calls_that_wait_are_sessions_of_the_host(serve: Serve) -> None:
    """A pull that waits is answered by a poke, and its session ends when its client goes away."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="memory://", pong_timeout_s=2)

    async def sessions() -> float:
        return (await asyncio.to_thread(metrics_of, instance))["pokebridge_sessions"]

    async def has(count: int) -> bool:
        return await sessions() == count

    async with instance.async_http("urn:user:bob", "send") as http:
        waiting = asyncio.ensure_future(http.get("/v1/messages", params={"wait_s": 30}))
        await wait_until(lambda: has(1))
        await http.post("/v1/messages", json={"recipient": "urn:user:bob", "body": 1})
        assert [each["body"] for each in (await waiting).json()["messages"]] == [1]
        waiting = asyncio.ensure_future(http.get("/v1/pokes", params={"wait_s": 30}))
        await wait_until(lambda: has(1))
        waiting.cancel()
        await wait_until(lambda: has(0))


def test_workers_that_keep_dying_turn_readiness_red(serve: Serve) -> None:
    """One death changes nothing. After three in a row readiness names the worker."""
    instance = serve(workers=2, mailbox="memory://")
    with instance.http() as http:
        for deaths in (1, 2, 3):
            assert http.get("/readyz").status_code == httpx.codes.OK
            # The process of worker 1 is the one that its last line names.
            served = re.findall(r"worker_serves.*pid=(\d+) worker=1", instance.log())
            os.kill(int(served[-1]), signal.SIGKILL)
            block_until(lambda: instance.log().count("worker_serves") == 2 + deaths)  # noqa: B023
        answer = http.get("/readyz")
    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert "worker 1 keeps ending" in answer.json()["detail"]


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_workers_end_with_their_hub(serve: Serve, *, is_stopped: bool) -> None:
    """The hub is killed: its workers end too, even one that stands still, and the port is free."""
    instance = serve(workers=2, mailbox="memory://")
    pids = instance.worker_pids()
    if is_stopped:
        os.kill(pids[0], signal.SIGSTOP)
    os.kill(instance.pid, signal.SIGKILL)
    block_until(lambda: not any(map(psutil.pid_exists, pids)))
    instance.kill()
    instance.start()


async def test_sigterm_drains_all_workers(serve: Serve) -> None:
    """Every session closes with 1012, pulls go on meanwhile, and the exit status is 0."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="memory://", drain_s=0.5)
    pids = instance.worker_pids()
    headers = instance.headers("urn:user:bob")
    sockets = [
        await websockets.connect(instance.ws_url, additional_headers=headers) for _ in range(6)
    ]
    for socket in sockets:
        await socket.recv()
    ended = asyncio.ensure_future(asyncio.to_thread(instance.terminate))
    for socket in sockets:
        await socket.wait_closed()
        assert socket.close_code == 1012
    assert await ended == 0
    await wait_until(lambda: not any(map(psutil.pid_exists, pids)))


async def test_a_revocation_reaches_a_worker_that_is_just_starting(serve: Serve) -> None:
    """A revocation between a worker's first copy and its first request applies there, too."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="memory://")
    before = instance.worker_pids()
    bob = instance.headers("urn:user:bob")
    os.kill(before[0], signal.SIGKILL)
    deadline_s = monotonic() + 30
    while not (started := {*instance.worker_pids()} - {*before}):  # without a pause: it is quick
        assert monotonic() < deadline_s
    (starting,) = started

    async def is_revoked() -> bool:
        async with instance.async_http("urn:admin", "admin") as http:
            with suppress(httpx.TransportError):  # it served already, and is killed as it is silent
                await http.delete("/v1/sessions/urn:user:bob", params={"revoke": True})
                return True
        return False

    os.kill(starting, signal.SIGSTOP)
    await wait_until(is_revoked)
    with suppress(ProcessLookupError):
        os.kill(starting, signal.SIGCONT)
    serves = re.compile(rf"worker_serves .*\bpid={starting}\b")
    await wait_until(lambda: serves.search(instance.log()))
    for _ in range(8):  # each on a connection of its own, so that both workers are asked
        async with instance.async_http("urn:user:bob") as http:
            assert (await http.get("/v1/messages", headers=bob)).status_code == 401


@pytest.mark.long
async def test_a_worker_that_stands_still_is_replaced(serve: Serve) -> None:
    """While a worker is stopped, others serve new clients, and its own clients reconnect."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="memory://")
    async with Crowd(instance.url, instance.token, 20) as crowd:
        victim = instance.worker_pids()[0]
        os.kill(victim, signal.SIGSTOP)
        await wait_until(lambda: victim not in instance.worker_pids(), 60)
        await wait_until(lambda: len(instance.worker_pids()) == 2, 30)
        await crowd.stop_sending()
        await wait_until(lambda: crowd.outstanding == 0, 30, "all that was accepted is pulled")
    assert "worker_stalled" in instance.log()


@pytest.mark.long
async def test_clients_leave_a_host_whose_hub_stands_still(serve: Serve) -> None:
    """The workers would answer pings without poking, so they end. They return with the hub."""
    instance = await asyncio.to_thread(serve, workers=2, mailbox="memory://")
    workers = instance.worker_pids()
    headers = instance.headers("urn:user:bob")
    socket = await websockets.connect(instance.ws_url, additional_headers=headers)
    await socket.recv()
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        await asyncio.wait_for(socket.wait_closed(), 30)
    finally:
        os.kill(instance.pid, signal.SIGCONT)
    await wait_until(lambda: len({*instance.worker_pids()} - {*workers}) == 2, 30)
    assert "hub_stalled" in instance.log()
