"""Calls of a worker that its hub answers.

A method is a name with the types of its arguments and of its result. An error raised in the hub is
raised again in the worker, with the same class.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from itertools import count
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast

import msgspec

from pokebridge import errors
from pokebridge.errors import PokebridgeError, UnavailableError
from pokebridge.supervisor import note_failure
from pokebridge.workers.frames import Call, ChannelError, Failure, Message, Result

MAX_WAITING: Final = 10_000
"""The most calls of one worker that wait for their answers. Further calls are refused."""
# The attributes that an error has beside its text, with the types that they must have.
_DETAILS: Final[Mapping[str, Mapping[str, Any]]] = {
    "NotPublishedError": {"recipients": frozenset[str], "too_large": frozenset[str]},
    "SignalRefusedError": {"is_too_large": bool},
    "RefusedError": {"status": HTTPStatus, "headers": dict[str, str]},
}

P = ParamSpec("P")
R = TypeVar("R")


class Method(Generic[P, R]):
    """A method of the hub: ``arguments``, a tuple, and ``result`` are the types that are sent."""

    def __init__(self, name: str, arguments: Any, result: Any, *, may_wait: bool = False) -> None:
        """``may_wait``: the number of its calls is limited elsewhere."""
        self.name = name
        self.may_wait = may_wait
        self.decode_arguments: Callable[[msgspec.Raw], tuple[Any, ...]]
        self.decode_arguments = msgspec.msgpack.Decoder(arguments).decode
        self.decode_result: Callable[[msgspec.Raw], R] = msgspec.msgpack.Decoder(result).decode


class Calls:
    """The worker's side.

    - ``_send``: sends a message to the hub
    - ``_room``: returns when there is room for one that may be long
    - ``_waiting``: the calls without an answer yet
    """

    def __init__(
        self, send: Callable[[Message], None], room: Callable[[], Awaitable[None]]
    ) -> None:
        self._send = send
        self._room = room
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[msgspec.Raw]] = {}

    async def call(self, method: Method[P, R], *arguments: P.args, **_: P.kwargs) -> R:
        """Call ``method`` on the hub. The hub finishes it even if the caller is cancelled.

        Raises:
            InputError: an argument has no encoding.
            UnavailableError: too many calls are waiting.
            PokebridgeError: what the hub raised.
        """
        if len(self._waiting) >= MAX_WAITING and not method.may_wait:
            raise UnavailableError(f"overloaded: {MAX_WAITING} calls are waiting")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._room()
            # The encoder takes any value where the decoder will see bytes.
            self._send(Call(number, method.name, cast("msgspec.Raw", arguments)))
            return method.decode_result(await future)
        finally:
            self._waiting.pop(number, None)

    def settle(self, answer: Result | Failure) -> None:
        """The hub has answered."""
        future = self._waiting.get(answer.call)
        if future is None or future.done():
            return  # nobody waits any more
        if isinstance(answer, Result):
            future.set_result(answer.value)
        else:
            future.set_exception(_error(answer))


class Answers:
    """The hub's side, for one worker.

    - ``_send``: sends a message to the worker
    - ``_room``: returns when there is room for one that may be long
    - ``_handlers``: what does each method, and the method
    - ``_tasks``: the calls under way, by their numbers
    """

    def __init__(
        self, send: Callable[[Message], None], room: Callable[[], Awaitable[None]]
    ) -> None:
        self._send = send
        self._room = room
        self._handlers: dict[str, tuple[Method[Any, Any], Callable[..., Awaitable[Any]]]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.get_running_loop()

    def offer(self, method: Method[P, R], handler: Callable[P, Awaitable[R]]) -> None:
        """Have ``handler`` do ``method``."""
        self._handlers[method.name] = (method, handler)

    def answer(self, call: Call) -> None:
        """Do ``call`` in the background."""
        method, handler = self._handlers[call.method]
        work = handler(*method.decode_arguments(call.arguments))
        self._tasks[call.number] = self._loop.create_task(self._answer(call.number, work))

    async def _answer(self, number: int, work: Awaitable[Any]) -> None:
        try:
            value = await work
            await self._room()
            self._send(Result(number, value))
        except PokebridgeError as error:
            self._send(_failure(number, error))
        except Exception as error:  # noqa: BLE001 - a defect: the caller must hear
            note_failure("worker_call", error)
            self._send(Failure(number, "PokebridgeError", "a defect: see the log", {}))
        finally:
            del self._tasks[number]


def _failure(number: int, error: PokebridgeError) -> Failure:
    kind = "UnavailableError" if isinstance(error, ChannelError) else type(error).__name__
    details = {name: getattr(error, name) for name in _DETAILS.get(kind, ())}
    return Failure(number, kind, str(error), details)


def _error(failure: Failure) -> PokebridgeError:
    wanted = _DETAILS.get(failure.kind, {})
    details = {name: msgspec.convert(failure.details[name], kind) for name, kind in wanted.items()}
    if failure.kind == "RefusedError":
        return errors.RefusedError(details["status"], failure.text, details["headers"])
    kind = getattr(errors, failure.kind, PokebridgeError)
    error: PokebridgeError = kind(failure.text, **details)
    return error
