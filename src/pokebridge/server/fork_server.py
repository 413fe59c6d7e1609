"""The fork server of a host: it has imported what a worker needs, and forks workers on request.

A fork takes milliseconds, where a new Python process takes a second to import everything. So a
worker that died is replaced at once, even on a busy host, and the workers share the memory of the
imported modules. The hub itself can't fork, because it has an event loop and threads.

The fork server ends with its hub, and the workers end with it.
"""

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import signal
import socket
import struct
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from typing import Final

from pokebridge.errors import UnavailableError

_PR_SET_PDEATHSIG: Final = 1
# The process id, or the error's number below 0.
_PID = struct.Struct("!i")
_DESCRIPTORS: Final = 2
ANSWER_TIMEOUT_S: Final = 60.0
"""A fork takes milliseconds, but the first one waits for all imports."""


class ForkServer:
    """The hub's side.

    - ``_control``: the connection to the process; ``None`` while there is none
    - ``_process``: the process
    - ``_lock``: one fork at a time
    """

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: Process | None = None
        self._lock = asyncio.Lock()

    async def fork(self, descriptors: Sequence[int]) -> int:
        """Fork a worker that has ``descriptors``. Returns its process id.

        Raises:
            OSError, UnavailableError: there is no room for another process, or the fork server has
                died or hangs. Then it is ended, and the next call starts another.
        """
        async with self._lock:
            control = self._control or await self._start()
            try:
                socket.send_fds(control, [b"f"], descriptors)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    answer = await asyncio.get_running_loop().sock_recv(control, _PID.size)
            except OSError:  # TimeoutError is one
                answer = b""
            if len(answer) < _PID.size:
                await self.close()
                raise UnavailableError("the fork server has died, or does not answer")
            (pid,) = _PID.unpack(answer)
            if pid < 0:
                raise UnavailableError(f"the system cannot start a process: {os.strerror(-pid)}")
            return int(pid)

    async def close(self) -> None:
        """End the fork server, and with it the workers that are left."""
        control, self._control = self._control, None
        process, self._process = self._process, None
        if control is not None:
            control.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                process.kill()  # it may stand still
            await process.wait()

    async def _start(self) -> socket.socket:
        own, its = socket.socketpair()
        own.settimeout(0)
        try:
            with its:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "pokebridge.server.fork_server", str(its.fileno())),
                    stdin=DEVNULL,
                    pass_fds=(its.fileno(),),
                )
        except BaseException:
            own.close()
            raise
        self._control = own
        return own


def main() -> None:
    """Fork workers until the hub is gone. The argument is the descriptor that leads to it."""
    control = socket.socket(fileno=int(sys.argv[1]))
    # A terminal and a service manager send them to all processes of a group. The hub acts on them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: the hub sees a worker's end
    _die_with_the_parent()
    from pokebridge.server import worker  # noqa: PLC0415 - the hub imports this module too

    gc.collect()
    gc.freeze()  # or the first collection of each worker would copy all memory
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, 1, _DESCRIPTORS)
        if not asked:
            return
        try:
            pid = os.fork()
        except OSError as error:  # the workers that there are go on
            pid = -(error.errno or errno.EAGAIN)
        if not pid:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _die_with_the_parent()
            worker.run(*(socket.socket(fileno=each) for each in descriptors))
            return
        for each in descriptors:
            os.close(each)
        control.sendall(_PID.pack(pid))


def _die_with_the_parent() -> None:
    """Make Linux kill this process when its parent dies, even while it is stopped."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere the end of the channel must do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


if __name__ == "__main__":
    main()
