"""Errors as the HTTP API answers them: RFC 9457 ``application/problem+json``."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated

import msgspec
from fastapi import FastAPI, Request, Response
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from pokebridge.api.exchange import NEVER_CACHED
from pokebridge.errors import PokebridgeError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2


class Problem(msgspec.Struct):
    """What an error says (RFC 9457, section 3.1)."""

    title: Annotated[str, Meta(description="The status in words.")]
    status: Annotated[int, Meta(description="The HTTP status.", ge=400, le=599)]
    detail: Annotated[str, Meta(description="What was wrong, for the person who reads it.")]
    type: Annotated[str, Meta(description="Always `about:blank`: the status says the kind.")] = (
        "about:blank"
    )


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error; a 503 also has a ``Retry-After``."""
    answer = Response(
        msgspec.json.encode(Problem(HTTPStatus(status).phrase, status, detail)),
        status_code=status,
        # Some errors are cached unless they forbid it (RFC 9110, section 15.1).
        headers={**NEVER_CACHED, **(headers or {})},
        media_type=MEDIA_TYPE,
    )
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        answer.headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return answer


def install(app: FastAPI) -> None:
    """Make ``app`` answer every error as a problem.

    Starlette raises an unexpected exception again after the answer, so the server logs it.
    """
    for kind in (PokebridgeError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    match error:
        case PokebridgeError():
            return problem(error.status, str(error), headers=_challenge(request, error.status))
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            return _method_not_allowed(request)
        case HTTPException(status_code=HTTPStatus.NOT_FOUND, detail="Not Found"):
            return problem(HTTPStatus.NOT_FOUND, "there is nothing at this path")
        case HTTPException():
            return problem(error.status_code, error.detail, headers=error.headers)
        case ClientDisconnect():
            return problem(HTTPStatus.BAD_REQUEST, "the request ended before its body did")
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect of the server: see its log")


def _challenge(request: Request, status: HTTPStatus) -> dict[str, str]:
    """The challenge that tells the caller how to authenticate (RFC 6750, section 3)."""
    if status == HTTPStatus.FORBIDDEN:
        return {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}
    if status == HTTPStatus.UNAUTHORIZED and "authorization" in request.headers:
        return {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    if status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _method_not_allowed(request: Request) -> Response:
    """A 405 that names all methods of the path, of which the router names one route's only."""
    allowed: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            # Only a mount of files has no methods of its own.
            allowed |= getattr(route, "methods", {"GET", "HEAD"})
    methods = ", ".join(sorted(allowed))
    return problem(
        HTTPStatus.METHOD_NOT_ALLOWED, f"this path takes {methods}", headers={"Allow": methods}
    )
