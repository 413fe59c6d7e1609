"""Gateway tests run on uvloop, as an instance does."""

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that ``pokebridge serve`` runs on."""
    return {"uvloop": uvloop.new_event_loop}
