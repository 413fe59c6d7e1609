"""The pages for browsers: the API's description, the console, the playground."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from pathlib import Path

from swagger_ui_bundle import swagger_ui_path  # type: ignore[import-untyped]  # it has none

from pokebridge import console
from pokebridge.api.exchange import Handler, Request, Response, Route, header_list
from pokebridge.api.files import Files

_DOCS_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pokebridge API</title>
<link rel="icon" href="docs/assets/favicon-32x32.png">
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
<main id="swagger"></main>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</html>
"""
_DOCS_SCRIPT = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger",
  deepLinking: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
});
"""
# Swagger UI sets style attributes and draws its icons from data: URLs.
_DOCS_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def docs_routes() -> Iterable[Route]:
    """``/docs``: Swagger UI, served from the installed package only."""
    assets = Files(Path(swagger_ui_path))
    page = _text(_DOCS_PAGE, "text/html; charset=utf-8")
    script = _text(_DOCS_SCRIPT, "text/javascript; charset=utf-8")
    yield Route("GET", "/docs", page, scope=None)
    yield Route("GET", "/docs/start.js", script, scope=None)
    yield Route("GET", "/docs/assets/{file:path}", assets.answer, scope=None)


def console_routes(*, has_playground: bool) -> Iterable[Route]:
    """``/console``, the playground at ``/`` if there is one, and the files of both."""
    files = Files(console.STATIC, header_list(console.HEADERS))
    yield Route("GET", "/assets/{file:path}", files.answer, scope=None)
    yield Route("GET", "/console", _page(files, console.CONSOLE_PAGE, console.HEADERS), scope=None)
    if has_playground:
        page = _page(files, console.PLAYGROUND_PAGE, console.PLAYGROUND_HEADERS)
        yield Route("GET", "/", page, scope=None)


def _text(text: str, media_type: str) -> Handler:
    headers = header_list({"Content-Type": media_type, **_DOCS_HEADERS})

    async def answer(_: Request) -> Response:
        return Response(HTTPStatus.OK, headers, text.encode())

    return answer


def _page(files: Files, name: str, headers: Mapping[str, str]) -> Handler:
    listed = header_list(headers)

    async def answer(request: Request) -> Response:
        return await files.file(request, name, listed)

    return answer
