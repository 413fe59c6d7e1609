"""The noise ratio that an instance reports, compared with a sampling profiler.

An instance in fan-out on NATS receives pokes for others and nothing else. Its ``noise_ratio`` comes
from one signal in 64, timed with the thread's CPU clock. The reference is independent of that:
py-spy stops the process some hundred times a second and samples where its main thread is.
"""

import asyncio
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from nats.aio.client import Client as NatsClient

from benchmarks.harness import BenchmarkError, Figure, Server, instance, progress, recipient
from benchmarks.transports import run_engine
from pokebridge.gateway.meter import WINDOW_S
from pokebridge.model import Poke
from pokebridge.wire import encode_pokes

SAMPLES_PER_S = 150
_BATCH = 20
_IN_BRIDGE = re.compile(r"Bridge\.on_signal \([^)]*gateway/bridge\.py")


async def measure(
    *, duration_s: int = 40, signals_per_s: int = 10_000, warm_up_s: float = WINDOW_S + 1
) -> list[Figure]:
    """Watch an instance for ``duration_s`` that drops ``signals_per_s`` of 20 pokes each.

    Before it there is a ``warm_up_s``, so that the figure of the instance, an average over a
    window, is of these signals alone.
    """
    with tempfile.TemporaryDirectory() as name:
        async with (
            run_engine("nats") as url,
            instance(transport=url) as server,
            _strangers(url, signals_per_s),
        ):
            await asyncio.sleep(warm_up_s)
            progress(f"profiled: py-spy watches for {duration_s} s")
            theirs = await _profile(server, duration_s, Path(name) / "stacks")
            ours = await _noise_ratio(server.port)
    made_of = f"{ours:.1%} to {theirs:.1%} of the CPU time"
    ratio = max(ours / theirs, theirs / ours)
    return [
        Figure(
            "profiled",
            "noise ratio and py-spy's, the larger to the other",
            ratio,
            "x",
            1.2,
            made_of,
        )
    ]


@asynccontextmanager
async def _strangers(nats: str, per_s: int) -> AsyncIterator[None]:
    """Publish pokes for recipients that have no session anywhere, until cancelled."""
    publishing = asyncio.create_task(_publish(nats, per_s))
    try:
        yield
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)


async def _publish(nats: str, per_s: int) -> None:
    client = NatsClient()
    await client.connect(nats)
    numbers = range(0, 2000, _BATCH)
    bodies = [encode_pokes([Poke(recipient(n + k), 1) for k in range(_BATCH)]) for n in numbers]
    began_s, sent = time.monotonic(), 0
    try:
        while True:
            for _ in range(int((time.monotonic() - began_s) * per_s) - sent):
                await client.publish("push-notifications.7", bodies[sent % len(bodies)])
                sent += 1
            await asyncio.sleep(0.005)
    finally:
        await client.close()


async def _profile(server: Server, duration_s: int, stacks: Path) -> float:
    """The share of the CPU time that goes into ``Bridge.on_signal``, by py-spy.

    py-spy can't tell whether a thread waits in uvloop or works, so its samples are shares of the
    elapsed time. The kernel knows during which share of that time the process had a CPU.
    """
    py_spy = Path(sys.executable).with_name("py-spy")
    options = ["--duration", str(duration_s), "--rate", str(SAMPLES_PER_S), "--idle", "--threads"]
    cpu_s, began_s = server.cpu_s(), time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(py_spy, "record", "--pid", str(server.process.pid)),
        *options,
        *("--format", "raw", "--output", stacks),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    if await process.wait():
        raise BenchmarkError("py-spy can't watch another process here: it needs ptrace(2)")
    used = (server.cpu_s() - cpu_s) / (time.monotonic() - began_s)
    text = await asyncio.to_thread(stacks.read_text)
    lines = [line.rpartition(" ") for line in text.splitlines()]
    counts = [(stack, int(count)) for stack, _, count in lines if "MainThread" in stack]
    in_bridge = sum(count for stack, count in counts if _IN_BRIDGE.search(stack))
    if not in_bridge:
        raise BenchmarkError("py-spy took no sample in Bridge.on_signal")
    return in_bridge / sum(count for _, count in counts) / used


async def _noise_ratio(port: int) -> float:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        text = (await http.get("/metrics")).text
    found = re.search(r"^pokebridge_noise_ratio (\S+)$", text, re.MULTILINE)
    if found is None:
        raise BenchmarkError("/metrics of the instance has no pokebridge_noise_ratio")
    return float(found[1])
