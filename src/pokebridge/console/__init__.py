"""The page at ``/`` on which two users can be tried: static files, served with ``--dev`` alone."""

import mimetypes
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# The table of file types is read from disk once: here, not at a request on the event loop.
mimetypes.init()

_HEADERS = {
    # Sessions may be moved to another instance; everything else is of this origin.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self' ws: wss:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept, but asked about each time: a new version shows at once.
    "Cache-Control": "no-cache",
}


def install(app: Starlette) -> None:
    """Serve the page at ``/`` of ``app``, and its files below ``/console``."""
    # The directory is looked at on the first request, off the event loop.
    files = _Files(directory=Path(__file__).parent / "static", check_dir=False)

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.add_route("/", page, include_in_schema=False)
    app.mount("/console", files)


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response
