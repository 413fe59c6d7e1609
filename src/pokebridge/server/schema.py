"""The HTTP API's bodies and queries as types, and its OpenAPI description made from them.

One struct both decodes a request and describes it, so that the description can't drift from the
code. OpenAPI 3.0, as the Swagger UI that we can ship reads nothing newer.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from pokebridge.model import DEFAULT_DEVICE, MAX_DEVICE_LENGTH, MAX_RECIPIENT_LENGTH, MAX_VERSION
from pokebridge.server.problems import MEDIA_TYPE, Problem

OPENAPI_VERSION = "3.0.3"

MAX_POKES = 1000
MAX_PAGE = 500
DEFAULT_PAGE = 50
MAX_BODY_BYTES = 65_536
MAX_ID_LENGTH = 128
# Ten years: for longer than that, leave it out.
MAX_TTL_S = 315_360_000
MAX_TOKEN_TTL_S = 31_536_000


def _visible_ascii(max_length: int, example: str, description: str) -> Meta:
    # For the description alone: the model's own checks speak more plainly than a pattern.
    return Meta(
        description=description,
        extra_json_schema={
            "minLength": 1,
            "maxLength": max_length,
            "pattern": "^[!-~]+$",
            "example": example,
        },
    )


Recipient = Annotated[
    str, _visible_ascii(MAX_RECIPIENT_LENGTH, "urn:user:bob", "Visible ASCII, never looked into.")
]
Device = Annotated[
    str, _visible_ascii(MAX_DEVICE_LENGTH, "phone", "One of the recipient's devices.")
]
MessageId = Annotated[str, _visible_ascii(MAX_ID_LENGTH, "order-4711", "The message's name.")]
Cursor = Annotated[int, Meta(ge=0, le=MAX_VERSION)]


class _Request(Struct, forbid_unknown_fields=True):
    pass


class PokeRequest(_Request):
    """Whom to poke: one `recipient`, or several `recipients`."""

    recipient: Recipient | UnsetType = UNSET
    recipients: Annotated[list[Recipient], Meta(max_length=MAX_POKES)] | UnsetType = UNSET


class PokesAccepted(Struct):
    """How many pokes are on their way."""

    accepted: Annotated[int, Meta(ge=0)]


class SendRequest(_Request):
    """A message. The same `id` from the same sender again commits nothing."""

    recipient: Recipient
    body: Annotated[
        Raw,
        Meta(
            description="Any JSON value, kept as it was written; up to 64 KiB, nested up to 100.",
            extra_json_schema={"example": {"text": "hello"}},
        ),
    ]
    id: MessageId | UnsetType = UNSET
    ttl_s: (
        Annotated[
            float,
            Meta(
                ge=0.001,
                le=MAX_TTL_S,
                description="Seconds after which it may be deleted unread; left out: never.",
                extra_json_schema={"example": 3600},
            ),
        ]
        | UnsetType
    ) = UNSET


class Sent(Struct):
    """The message is durable under this `id` and `version`."""

    id: MessageId
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]


class PullQuery(Struct):
    """What to pull."""

    after: Annotated[Cursor, Meta(description="The version that the caller has.")] = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE, description="At most so many messages.")] = (
        DEFAULT_PAGE
    )
    device: (
        Annotated[Device, Meta(description="Makes it known: messages wait for its ack too.")]
        | UnsetType
    ) = UNSET


class PulledMessage(Struct):
    """A message of the caller's."""

    id: MessageId
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]
    sender: Recipient
    body: Raw
    sent_at: Annotated[
        str,
        Meta(
            description="UTC, RFC 3339.",
            extra_json_schema={"format": "date-time", "example": "2026-11-24T05:30:00.123Z"},
        ),
    ]


class Pulled(Struct):
    """Messages in order. `version` is the next `after`; `more`: ask again at once."""

    messages: list[PulledMessage]
    version: Cursor
    more: bool


class AckQuery(Struct):
    """Whose ack it is."""

    device: Device | UnsetType = UNSET


class AckRequest(_Request):
    """This device has everything up to `version`."""

    version: Cursor
    device: (
        Annotated[
            Device,
            Meta(description=f"Instead of the query parameter; neither: `{DEFAULT_DEVICE}`."),
        ]
        | UnsetType
    ) = UNSET


class ConnectInfo(Struct):
    """Where the caller's shard is owned now."""

    url: Annotated[str, Meta(extra_json_schema={"example": "wss://a.example/v1/connect"})]
    shard: Annotated[int, Meta(ge=0)]
    instance: str


class Instance(Struct):
    """One member of the cluster, with its open `sessions` and the `shards` that it owns."""

    id: str
    url: str
    state: str
    sessions: Annotated[int, Meta(ge=0)]
    shards: list[int]


class Traffic(Struct):
    """The load, against the red line: `global_ops_per_s` counts a message once an instance."""

    messages_per_s: float
    global_ops_per_s: float
    red_line: float
    noise_ratio: Annotated[float, Meta(description="CPU time spent on others' pokes, 0 to 1.")]
    over_red_line: bool


class Cluster(Struct):
    """The cluster as this instance sees it."""

    mode: Literal["fanout", "partitioned"]
    epoch: int
    shard_count: int
    instances: list[Instance]
    traffic: Traffic


class ModeRequest(_Request):
    """The mode to migrate to."""

    mode: Literal["fanout", "partitioned"]


class DrainRequest(_Request):
    """The instance that is to send its sessions elsewhere."""

    instance: str


class TokenRequest(_Request):
    """Whose token it is to be."""

    sub: Recipient
    scope: Annotated[str, Meta(description="Space-separated.")] = "send poke admin"
    ttl_s: Annotated[float, Meta(ge=1, le=MAX_TOKEN_TTL_S)] = 3600


class Token(Struct):
    """A signed token."""

    token: str


class Health(Struct):
    """All is well."""

    status: Literal["ok"] = "ok"


# --- OpenAPI ----------------------------------------------------------------------------------

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
}
_OF_A_BODY = (400, 408, 413, 422)
_IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The `ETag` of the last answer: then nothing new is a 304.",
    "schema": {"type": "string", "example": '"17"'},
}
_ETAG = {"ETag": {"description": "The newest version.", "schema": {"type": "string"}}}
_REF = "#/components/schemas/{name}"
_DESCRIBED = (
    PokeRequest,
    PokesAccepted,
    SendRequest,
    Sent,
    Pulled,
    AckRequest,
    ConnectInfo,
    Cluster,
    ModeRequest,
    DrainRequest,
    TokenRequest,
    Token,
    Health,
    Problem,
)


def operation(
    summary: str,
    *,
    answers: Mapping[int, type[Struct] | str],
    problems: Iterable[int] = (),
    scope: str | None = "",
    body: type[Struct] | None = None,
    query: type[Struct] | None = None,
    path: Mapping[str, Any] | None = None,
    has_etag: bool = False,
) -> dict[str, Any]:
    """A route's OpenAPI part, as keyword arguments for FastAPI's ``add_api_route``.

    ``answers`` maps a status to the struct that answers, or to words when there is no JSON body.
    ``scope`` is what the token must have, ``""`` a token without any, ``None`` no token.
    ``has_etag``: the answers carry an ``ETag``, and ``If-None-Match`` is heeded.
    """
    failures = {*problems, 413, *(_OF_A_BODY if body else ()), *((422,) if query else ())}
    extra: dict[str, Any] = {"parameters": [*_query_parameters(query), *_path_parameters(path)]}
    described = {status: _answer(status, answer) for status, answer in answers.items()}
    if has_etag:
        extra["parameters"].append(_IF_NONE_MATCH)
        described = {status: {**answer, "headers": _ETAG} for status, answer in described.items()}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": _json_content(body)}
    if scope is not None:
        failures |= {401, 503, *((403,) if scope else ())}
        extra["security"] = [{"bearer": []}]
    first, *_ = answers
    return {
        "summary": summary,
        "description": f"Needs the scope `{scope}`." if scope else "",
        "status_code": first,
        "responses": {
            **described,
            **{status: _failure(status) for status in sorted(failures)},
        },
        "openapi_extra": extra,
    }


def components() -> dict[str, Any]:
    """The ``components`` of the OpenAPI description: every schema, and how to authenticate."""
    _, schemas = msgspec.json.schema_components(_DESCRIBED, ref_template=_REF)
    # One of the two: msgspec has no way to say it.
    schemas[PokeRequest.__name__] |= {"minProperties": 1, "maxProperties": 1}
    bearer = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    return {"schemas": schemas, "securitySchemes": {"bearer": bearer}}


def _query_parameters(query: type[Struct] | None) -> list[dict[str, Any]]:
    if query is None:
        return []
    _, schemas = msgspec.json.schema_components([query], ref_template=_REF)
    properties: dict[str, dict[str, Any]] = schemas[query.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]


def _path_parameters(path: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": msgspec.json.schema(of)}
        for name, of in (path or {}).items()
    ]


def _json_content(struct: type[Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=struct.__name__)}}}


def _answer(status: int, answer: type[Struct] | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"description": answer}
    words = (answer.__doc__ or HTTPStatus(status).phrase).strip()
    return {"description": words, "content": _json_content(answer)}


def _failure(status: int) -> dict[str, Any]:
    schema = {"$ref": _REF.format(name=Problem.__name__)}
    return {"description": _PROBLEMS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
