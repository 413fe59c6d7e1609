"""One instance on one port, which serves the HTTP API and the WebSockets.

:func:`serve` runs one. It is imported on first use, so that a command which needs only an adapter
does not import the server.
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
