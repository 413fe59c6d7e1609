"""The FastAPI app of the HTTP API, and its OpenAPI description made from the structs of ``schema``.

Handlers take the plain request and return the finished response. That avoids FastAPI's own
validation and keeps a message's body as it was written. What FastAPI would read off a signature is
given here, by the structs that decode. The version is OpenAPI 3.0, because the bundled Swagger UI
reads nothing newer.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from msgspec import Struct
from starlette.middleware import Middleware

from pokebridge.api.problems import MEDIA_TYPE, Problem
from pokebridge.api.schema import PokeRequest

_PROBLEMS = {
    400: "The body is not JSON, or did not arrive whole.",
    401: "There is no valid bearer token.",
    403: "The token lacks the scope.",
    404: "There is no such thing here.",
    408: "The body took too long to arrive.",
    409: "That can't be done in the present state.",
    413: "The body is too large.",
    422: "The request is not one that the contract allows.",
    503: "A part that this depends on does not answer: worth a retry.",
    507: "The recipient's mailbox is full: not taken, and no retry helps before some is acked.",
}
_OF_A_BODY = (400, 408, 422)
_IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The `ETag` of the last answer: then nothing new is a 304.",
    "schema": {"type": "string", "example": '"17-c0ffee"'},
}
_ETAG = {
    "ETag": {
        "description": "Opaque. It changes with the newest version, and is this caller's alone.",
        "schema": {"type": "string"},
    }
}
_REF = "#/components/schemas/{name}"


class Api(FastAPI):
    """FastAPI for handlers that decode and encode by themselves."""

    def __init__(self, *, title: str, description: str, middleware: Sequence[Middleware]) -> None:
        super().__init__(
            title=title,
            version="1",
            description=description,
            middleware=middleware,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            generate_unique_id_function=lambda route: route.name,
        )
        self._structs: set[type[Struct]] = {Problem}

    def call(
        self,
        method: str,
        path: str,
        handler: Callable[[Request], Awaitable[Response]],
        summary: str,
        *,
        answers: Mapping[int, type[Struct] | str],
        problems: Iterable[int] = (),
        scope: str | None = "",
        body: type[Struct] | None = None,
        query: type[Struct] | None = None,
        path_types: Mapping[str, Any] | None = None,
        has_etag: bool = False,
    ) -> None:
        """Have ``handler`` answer ``method`` at ``path``, and describe it.

        ``answers`` maps a status to the struct of its body, or to a description when it has no
        JSON body. ``scope`` is the scope that the token must grant; ``""`` accepts any token,
        ``None`` needs no token. ``has_etag``: answers carry an ``ETag``, and ``If-None-Match`` is
        honoured. A handler for GET answers HEAD too (RFC 9110, section 9.1).
        """
        bodies = [body, *answers.values()]
        self._structs.update(struct for struct in bodies if isinstance(struct, type))
        failures = {*problems, 413, *(_OF_A_BODY if body else ()), *((422,) if query else ())}
        if scope is not None:
            failures |= {401, 503, *((403,) if scope else ())}
        parameters = [*_query_parameters(query), *_path_parameters(path_types or {})]
        self.add_api_route(
            path,
            handler,
            methods=[method],
            summary=summary,
            description=f"Needs the scope `{scope}`." if scope else "",
            status_code=next(iter(answers)),
            response_class=Response,
            responses={
                **{
                    status: _answer(answer, has_etag=has_etag) for status, answer in answers.items()
                },
                **{status: _failure(status) for status in sorted(failures)},
            },
            openapi_extra={
                "parameters": [*parameters, *([_IF_NONE_MATCH] if has_etag else [])],
                **({"requestBody": {"required": True, "content": _json(body)}} if body else {}),
                **({"security": [{"bearer": []}]} if scope is not None else {}),
            },
        )
        if method == "GET":
            self.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description, built once."""
        if self.openapi_schema is None:
            self.openapi_schema = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                openapi_version="3.0.3",
                routes=self.routes,
            ) | {"components": self._components()}
        return self.openapi_schema

    def _components(self) -> dict[str, Any]:
        structs = sorted(self._structs, key=lambda struct: struct.__name__)
        _, schemas = msgspec.json.schema_components(structs, ref_template=_REF)
        # Exactly one of the two fields, which msgspec can't express.
        schemas[PokeRequest.__name__] |= {"minProperties": 1, "maxProperties": 1}
        bearer = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
        return {"schemas": schemas, "securitySchemes": {"bearer": bearer}}


def _query_parameters(query: type[Struct] | None) -> list[dict[str, Any]]:
    if query is None:
        return []
    _, schemas = msgspec.json.schema_components([query], ref_template=_REF)
    properties: dict[str, dict[str, Any]] = schemas[query.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]


def _path_parameters(types: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": msgspec.json.schema(kind)}
        for name, kind in types.items()
    ]


def _json(struct: type[Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=struct.__name__)}}}


def _answer(answer: type[Struct] | str, *, has_etag: bool) -> dict[str, Any]:
    headers = {"headers": _ETAG} if has_etag else {}
    if isinstance(answer, str):
        return {"description": answer, **headers}
    return {"description": answer.__doc__ or "", "content": _json(answer), **headers}


def _failure(status: int) -> dict[str, Any]:
    schema = {"$ref": _REF.format(name=Problem.__name__)}
    return {"description": _PROBLEMS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
