"""``python -m tests.fuzz.turns serve …``: an instance that notes how long its loop was busy.

A call waits for the turn of the loop that is under way, is read in the next and answered in the
one after it. So an instance that has a CPU for itself answers ``/healthz`` within the CPU time of
three turns. The longest three in a row are written to ``turns_ms`` in the working directory, in
milliseconds, whenever they are surpassed. Other work on the machine stretches a clock, and hardly
that.
"""

import asyncio
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from pokebridge.cli import main
from pokebridge.server import uvicorn_server

FILE = "turns_ms"
TICK_S = 0.002


async def _watch() -> None:
    turns: deque[float] = deque(maxlen=3)
    longest_s, before_s = 0.0, time.thread_time()
    while True:
        await asyncio.sleep(TICK_S)
        now_s = time.thread_time()
        turns.append(now_s - before_s)
        if sum(turns) > longest_s:
            longest_s = sum(turns)
            Path(FILE).write_text(f"{longest_s * 1000:.1f}")  # noqa: ASYNC240 - rare
        before_s = time.thread_time()


class _Server(uvicorn_server._Server):
    async def startup(self, sockets: Any = None) -> None:
        """Begin to watch once it listens."""
        await super().startup(sockets)
        self._watching = asyncio.create_task(_watch())


if __name__ == "__main__":
    uvicorn_server._Server = _Server  # type: ignore[misc]
    main(sys.argv[1:])
