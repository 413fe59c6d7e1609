"""What httplint, a third party's linter of HTTP messages, says of every kind of answer."""

import json
from typing import NamedTuple

from httplint import HttpRequestLinter, HttpResponseLinter
from httplint.note import levels

from tests.gateway.harness import Client
from tests.support import Instance, Serve

TIMEOUT_S = 60.0
HOST = "Host: b.example"
UPGRADE = (
    *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
PREFLIGHT = ("Origin: https://a.example", "Access-Control-Request-Method: POST")
MESSAGE = json.dumps({"recipient": "urn:user:bob", "body": {"text": "é"}})

ACCEPTED = {
    # `private` is for old caches that do not know `no-store` (docs/protocol.md).
    "The no-store cache directive overrides other directives.",
    # What it notes of every response with this status.
    "The server didn't understand the request.",
    # A preflight's answer varies with the requested method and headers.
    "This resource varies in 4 ways.",
    # RFC 9110, section 12.5.3, has it with 415. The linter knows an older one.
    '"Accept-Encoding" isn\'t valid in a response.',
    # A page of 400 bytes.
    "This response cannot be served from cache without validation, and doesn't have a validator.",
}
"""Notes that are no mistakes here."""
# RFC 9110, section 6.6.1: an interim response may do without.
ACCEPTED_IN_101 = {"This response doesn't have a Date header."}


class Ask(NamedTuple):
    """A request, the status of its answer, and whether it has a token."""

    status: int
    method: str
    target: str
    fields: tuple[str, ...] = (HOST,)
    body: str = ""
    has_token: bool = True
    version: str = "1.1"


ASKS = (
    Ask(200, "GET", "/healthz", has_token=False),
    Ask(200, "GET", "/healthz", (), version="1.0"),
    Ask(200, "GET", "/readyz"),
    Ask(200, "GET", "/metrics"),
    Ask(200, "GET", "/openapi.json"),
    Ask(200, "GET", "/docs"),
    Ask(200, "GET", "/docs/start.js"),
    Ask(200, "GET", "/console"),
    Ask(200, "GET", "/"),
    Ask(202, "POST", "/v1/messages", body=MESSAGE),
    Ask(200, "GET", "/v1/messages?after=0", (HOST, "Origin: https://a.example")),
    Ask(200, "HEAD", "/v1/messages?after=0"),
    Ask(204, "POST", "/v1/messages/ack", body='{"version":1}'),
    Ask(202, "POST", "/v1/pokes", body='{"recipient":"urn:user:bob"}'),
    Ask(200, "GET", "/v1/connect-info"),
    Ask(200, "GET", "/v1/cluster"),
    Ask(200, "OPTIONS", "/v1/messages", (HOST, *PREFLIGHT)),
    Ask(400, "OPTIONS", "/v1/messages", (HOST, *PREFLIGHT[:1], "Access-Control-Request-Method: X")),
    Ask(401, "GET", "/v1/messages", has_token=False),
    Ask(404, "GET", "/nothing"),
    Ask(405, "PUT", "/v1/messages"),
    Ask(413, "POST", "/v1/messages", (HOST, "Content-Length: 9999999")),
    Ask(415, "POST", "/v1/messages", (HOST, "Content-Encoding: gzip"), body="x"),
    Ask(422, "POST", "/v1/messages", body="{}"),
    Ask(400, "GET", "/", ()),
    Ask(431, "GET", "/", (HOST, f"X: {'y' * 20_000}")),
    Ask(501, "GET", "/", (HOST, "Transfer-Encoding: gzip, chunked")),
    Ask(101, "GET", "/v1/connect", (HOST, *UPGRADE)),
    Ask(401, "GET", "/v1/connect", (HOST, *UPGRADE), has_token=False),
    Ask(400, "GET", "/v1/connect", (HOST, *UPGRADE[:2], "Sec-WebSocket-Version: 12", UPGRADE[3])),
    Ask(426, "GET", "/v1/connect"),
)


async def test_every_kind_of_answer_is_as_the_rfcs_have_it(serve: Serve) -> None:
    """No header is missing, wrong or contradicts another, with statuses from 101 to 501."""
    instance = serve(mailbox="memory://")
    found = {}
    for ask in ASKS:
        accepted = ACCEPTED | (ACCEPTED_IN_101 if ask.status == 101 else set())
        notes = await _notes(instance, ask) - accepted
        if notes:
            found[f"{ask.status} {ask.method} {ask.target}"] = notes
    assert found == {}


async def _notes(instance: Instance, ask: Ask) -> set[str]:
    """What the linter warns of."""
    fields = list(ask.fields)
    if ask.has_token:
        fields.append(f"Authorization: Bearer {instance.token('urn:user:bob', 'send poke admin')}")
    if ask.body:
        fields += ["Content-Type: application/json", f"Content-Length: {len(ask.body)}"]
    lines = [f"{ask.method} {ask.target} HTTP/{ask.version}", *fields, "", ask.body]
    client = await Client.dial(instance.port)
    try:
        assert await client.request("\r\n".join(lines), TIMEOUT_S) == ask.status, ask
        length = int(client.headers.get("content-length", "0"))
        has_body = ask.method != "HEAD" and ask.status not in {101, 204}
        body = await client.reader.readexactly(length) if has_body else b""
    finally:
        await client.close()
    request = HttpRequestLinter()
    version = f"HTTP/{ask.version}".encode()
    request.process_request_topline(ask.method.encode(), ask.target.encode(), version)
    request.process_headers([_field(line) for line in fields])
    request.finish_content(complete=True)
    linter = HttpResponseLinter(no_content=not has_body, _related=request)
    first, *rest = client.head.decode("latin-1").split("\r\n")[:-2]
    linter.process_response_topline(*first.encode("latin-1").split(b" ", 2))
    linter.process_headers([_field(line) for line in rest])
    linter.feed_content(body)
    linter.finish_content(complete=True)
    return {note.summary for note in linter.notes if note.level in {levels.WARN, levels.BAD}}


def _field(line: str) -> tuple[bytes, bytes]:
    name, _, value = line.encode("latin-1").partition(b": ")
    return name, value
