"""The pages for browsers, static files without a build step.

``/console`` is the operator's: the cluster live. ``/``, with ``--dev`` alone, is a playground on
which two users can be tried.
"""

import mimetypes
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# The table of file types is read from disk once: here, not at a request on the event loop.
mimetypes.init()

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src {connect}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    # What comes from the API is text, and never becomes markup.
    "require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY.format(connect="'self'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept, but asked about each time: a new version shows at once.
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


# The directory is looked at on the first request, off the event loop.
_files = _Files(directory=Path(__file__).parent / "static", check_dir=False)


def install(app: Starlette) -> None:
    """Serve the console at ``/console`` of ``app``, and all pages' files below ``/assets``."""
    _add_page(app, "/console", "console/index.html", {})
    app.mount("/assets", _files)


def install_playground(app: Starlette) -> None:
    """Serve the playground at ``/`` of ``app``, where :func:`install` has been called."""
    # Its sessions may be moved to another instance; everything else is of this origin.
    policy = _POLICY.format(connect="'self' ws: wss:")
    _add_page(app, "/", "playground/index.html", {"Content-Security-Policy": policy})


def _add_page(app: Starlette, path: str, file: str, headers: Mapping[str, str]) -> None:
    async def page(request: Request) -> Response:
        response = await _files.get_response(file, request.scope)
        response.headers.update(headers)
        return response

    app.add_route(path, page, include_in_schema=False)
