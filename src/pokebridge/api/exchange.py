"""What every call of the HTTP API does: authorize the caller, read the request, answer."""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeVar

import msgspec
from fastapi import Request, Response
from starlette.exceptions import HTTPException

from pokebridge.errors import AuthError, ForbiddenError, InputError
from pokebridge.submission import decode_json
from pokebridge.tokens import Claims, TokenVerifier

BODY_DEADLINE_S = 30.0

# An answer belongs to the caller whose token asked for it.
NEVER_CACHED = {"Cache-Control": "private, no-store"}

T = TypeVar("T")


async def authorize(verifier: TokenVerifier, request: Request, scope: str = "") -> Claims:
    """The caller, from the bearer token (RFC 6750, section 2.1), which must grant ``scope``.

    Raises:
        AuthError: there is no valid token.
        ForbiddenError: the token lacks the scope.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise AuthError("this call needs a token: Authorization: Bearer …")
    claims = await verifier.verify(token.strip())
    if scope and scope not in claims.scopes:
        raise ForbiddenError(f"the token lacks the scope {scope!r}")
    return claims


def body_reader(kind: type[T]) -> Callable[[Request], Awaitable[T]]:
    """A function that reads a request's JSON body as ``kind``."""
    decode = msgspec.json.Decoder(kind).decode

    async def read(request: Request) -> T:
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                text = await request.body()
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.REQUEST_TIMEOUT, "the body took too long to arrive"
            ) from None
        return decode_json(decode, text)

    return read


def read_query(request: Request, kind: type[T]) -> T:
    """The query as ``kind``. Raises :class:`~pokebridge.errors.InputError` when it is invalid."""
    given = request.query_params
    if len(given) != len(given.multi_items()):
        raise InputError("query: a parameter is given twice")
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"query: {error}") from None


def json_response(
    answer: msgspec.Struct, status: int = HTTPStatus.OK, *, headers: dict[str, str] | None = None
) -> Response:
    """The response with ``answer`` as its JSON body. No cache may store it."""
    return Response(
        msgspec.json.encode(answer),
        status,
        headers={**NEVER_CACHED, **(headers or {})},
        media_type="application/json",
    )
