"""Errors as the HTTP API answers them: RFC 9457 ``application/problem+json``."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated

import msgspec
from msgspec import Meta

from pokebridge.api.exchange import NEVER_CACHED, Request, Response, header_list
from pokebridge.errors import PokebridgeError, RefusedError

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


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error; a 503 also has a ``Retry-After``."""
    # Some errors are cached unless they forbid it (RFC 9110, section 15.1).
    given = headers or {}
    added = [(b"content-type", MEDIA_TYPE.encode()), NEVER_CACHED, *header_list(given)]
    if status == HTTPStatus.SERVICE_UNAVAILABLE and "Retry-After" not in given:
        added.append((b"retry-after", b"%d" % RETRY_AFTER_S))
    body = Problem(HTTPStatus(status).phrase, int(status), detail)
    return Response(status, added, msgspec.json.encode(body))


def refusal(error: PokebridgeError, request: Request) -> Response:
    """The response for an ``error`` that ``request`` has led to."""
    headers = error.headers if isinstance(error, RefusedError) else {}
    return problem(error.status, str(error), {**_challenge(error.status, request), **headers})


def defect() -> Response:
    """The response for an unforeseen error. It reveals nothing."""
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect of the server: see its log")


def _challenge(status: HTTPStatus, request: Request) -> dict[str, str]:
    """The challenge that tells the caller how to authenticate (RFC 6750, section 3)."""
    if status == HTTPStatus.FORBIDDEN:
        return {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}
    if status == HTTPStatus.UNAUTHORIZED and b"authorization" in request.headers:
        return {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    if status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    return {}
