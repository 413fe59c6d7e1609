"""No coroutine that loops without end runs outside the supervisor: it could die unnoticed."""

import ast
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[1] / "src/pokebridge"
# They run in the processes of tools and tests, or in the application of the library's user.
ELSEWHERE = ("bench", "cli", "client", "testing")
STARTS = {"create_task", "ensure_future", "run_once", "spawn", "_spawn", "run_coroutine_threadsafe"}
# Tasks that loop, or are known only at run time, with the reason why they need no supervisor.
JUSTIFIED = {
    ("coordination/nats.py", "(work)"): "one call on the connection, which its caller awaits",
    ("engines/addresses.py", "waiting.pop(0)"): "one attempt to connect, which the dialling awaits",
    ("fallback/push.py", "_push"): "records one outcome, for as long as its lease lasts",
    ("gateway/entrance.py", "(coroutine)"): "one handshake or one new token",
    ("gateway/recall.py", "(self._answer)"): "repeats what it knows once",
    ("gateway/recall.py", "(self._ask)"): "asks a few times",
    ("server/hub.py", "(work)"): "one part of a worker's start, awaited there",
    ("server/hub.py", "wait"): "the end of the instance, awaited beside that start",
    ("server/worker_http.py", "_listen"): "one call's client, for as long as the call lasts",
    ("transport/google_pubsub_subscription.py", "(part)"): "the supervised stream awaits its parts",
    ("transport/reconnecting_link.py", "(work)"): "one call on the connection, which ends with it",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module that an instance runs, by its path."""
    for path in sorted(SRC.rglob("*.py")):
        place = path.relative_to(SRC)
        if place.parts[0] not in ELSEWHERE and place.name != "supervisor.py":
            yield str(place), ast.parse(path.read_text())


def name_of(called: ast.expr) -> str:
    """The bare name of what is called."""
    if isinstance(called, ast.Attribute):
        return called.attr
    return ast.unparse(called)


def looping(tree: ast.Module) -> set[str]:
    """The coroutine functions that wait in a loop, by themselves or in one that they call."""
    functions = {
        node.name: node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)
    }

    def waits_in_a_loop(node: ast.AST) -> bool:
        return isinstance(node, ast.AsyncFor) or (
            isinstance(node, ast.While)
            and any(isinstance(each, ast.Await) for each in ast.walk(node))
        )

    found = {name for name, body in functions.items() if any(map(waits_in_a_loop, ast.walk(body)))}
    while more := {
        name
        for name, body in functions.items()
        for call in ast.walk(body)
        if isinstance(call, ast.Call) and name not in found and name_of(call.func) in found
    }:
        found |= more
    return found


def started(tree: ast.Module) -> Iterator[str]:
    """What is started in the background, not by the supervisor: a function, or a (variable)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in STARTS and node.args:
            work = node.args[-1]
            yield name_of(work.func) if isinstance(work, ast.Call) else f"({ast.unparse(work)})"


def test_every_background_loop_is_supervised() -> None:
    """Any other task runs a coroutine without a loop, or is listed above with a reason."""
    functions = {
        node.name
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncFunctionDef)
    }
    unclear = {
        (place, work)
        for place, tree in modules()
        for work in started(tree)
        if work in looping(tree) or work not in functions
    }
    assert unclear == JUSTIFIED.keys()


def test_a_loop_outside_the_supervisor_is_found() -> None:
    """The search finds a loop in a started coroutine and in the functions that it calls."""
    tree = ast.parse(
        "async def loop():\n while True:\n  await x()\n"
        "async def outer():\n await loop()\n"
        "asyncio.create_task(loop())\nself._spawn('name', self.outer())\n"
    )
    assert looping(tree) == {"loop", "outer"}
    assert list(started(tree)) == ["loop", "outer"]
