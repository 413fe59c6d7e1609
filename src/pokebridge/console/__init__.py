"""The pages for browsers: static files, served as they are.

``/console`` shows an operator the cluster, live. ``/`` is a playground with two users, served with
``--dev`` only. Both connect with the JavaScript client: ``static/vendor`` has a build of it.
"""

import mimetypes
from collections.abc import Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

# Reads the table of file types from disk now. Later it would block the event loop in a request.
mimetypes.init()

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src {connect}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    # Text from the API can't become markup.
    "require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY.format(connect="'self'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser may keep a file, but asks each time whether it is current.
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


# Checked at the first request, in a thread. Here the check would block the event loop.
_files = _Files(directory=Path(__file__).parent / "static", check_dir=False)


def install(app: Starlette) -> None:
    """Serve the console at ``/console`` of ``app``, and all pages' files below ``/assets``."""
    _add_page(app, "/console", "console/index.html", {})
    app.mount("/assets", _files)


def install_playground(app: Starlette) -> None:
    """Serve the playground at ``/`` of ``app``, where :func:`install` has been called."""
    # The bridge may move its sessions to another instance. Everything else comes from this origin.
    policy = _POLICY.format(connect="'self' ws: wss:")
    _add_page(app, "/", "playground/index.html", {"Content-Security-Policy": policy})


def _add_page(app: Starlette, path: str, file: str, headers: Mapping[str, str]) -> None:
    async def page(request: Request) -> Response:
        response = await _files.get_response(file, request.scope)
        response.headers.update(headers)
        return response

    app.add_route(path, page, include_in_schema=False)
