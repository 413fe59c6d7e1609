"""The calls of the HTTP API, and their OpenAPI description made from the structs of ``schema``.

The structs that decode a request also describe it, so that the description can't drift from the
code. The version is OpenAPI 3.0, because the bundled Swagger UI reads nothing newer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from pokebridge.api.exchange import Route
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
    415: "The body is compressed.",
    422: "The request is not one that the contract allows.",
    429: "The caller's address has all the sessions that it may have.",
    503: "A part that this depends on does not answer: worth a retry.",
    507: "The recipient's mailbox is full: not taken, and no retry helps before some is acked.",
}
_OF_A_BODY = (400, 408, 415, 422)
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


@dataclass(frozen=True, slots=True)
class Call(Route):
    """A route that the description lists.

    ``answers`` maps a status to the struct of its body, or to a description when it has no JSON
    body. ``problems`` are the errors that are peculiar to the call. ``has_etag``: answers carry an
    ``ETag``, and ``If-None-Match`` is honoured.
    """

    summary: str
    _: KW_ONLY
    answers: Mapping[int, type[Struct] | str]
    problems: Iterable[int] = ()
    body: type[Struct] | None = None
    query: type[Struct] | None = None
    path_types: Mapping[str, Any] = field(default_factory=dict)
    has_etag: bool = False

    @property
    def label(self) -> str:
        """The route in metrics."""
        return self.path

    def describe(self) -> dict[str, Any]:
        """Return the call as an operation of OpenAPI."""
        failures = {*self.problems, 413}
        failures |= {*(_OF_A_BODY if self.body else ()), *((422,) if self.query else ())}
        if self.scope is not None:
            failures |= {401, 503, *((403,) if self.scope else ())}
        parameters = [*_query_parameters(self.query), *_path_parameters(self.path_types)]
        answers = {
            status: _answer(answer, has_etag=self.has_etag)
            for status, answer in self.answers.items()
        }
        responses = {**answers, **{status: _failure(status) for status in sorted(failures)}}
        return {
            "summary": self.summary,
            **({"description": f"Needs the scope `{self.scope}`."} if self.scope else {}),
            "operationId": self.handler.__name__,
            "parameters": [*parameters, *([_IF_NONE_MATCH] if self.has_etag else [])],
            **(
                {"requestBody": {"required": True, "content": _json(self.body)}}
                if self.body
                else {}
            ),
            "responses": {str(status): response for status, response in responses.items()},
            **({"security": [{"bearer": []}]} if self.scope is not None else {}),
        }


def describe(title: str, description: str, calls: Sequence[Call]) -> dict[str, Any]:
    """Return the OpenAPI description of an API that has ``calls``."""
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        path = paths.setdefault(call.path.replace(":path}", "}"), {})
        path[call.method.lower()] = call.describe()
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "description": description, "version": "1"},
        "servers": [{"url": "."}],  # where this description is, also below a proxy's prefix
        "paths": paths,
        "components": _components(calls),
    }


def _components(calls: Sequence[Call]) -> dict[str, Any]:
    bodies = {body for call in calls for body in (call.body, *call.answers.values())}
    structs = {Problem, *(body for body in bodies if isinstance(body, type))}
    _, schemas = msgspec.json.schema_components(
        sorted(structs, key=lambda struct: struct.__name__), ref_template=_REF
    )
    if PokeRequest in structs:  # exactly one of its two fields, which msgspec can't express
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
