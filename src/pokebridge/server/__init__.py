"""One instance on one port: the HTTP API, and the WebSockets beside it.

:func:`serve` runs one. It is imported when it is asked for, so that a command which only needs an
adapter does not wait for it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pokebridge.server.assemble import serve

__all__ = ["serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":
        from pokebridge.server.assemble import serve  # noqa: PLC0415

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
