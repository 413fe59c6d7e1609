"""Traces from the send to the delivery, over two instances, and that they change nothing else."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from opentelemetry.trace import StatusCode

from pokebridge.asgi import Receive, Scope, Send
from pokebridge.errors import TransportError
from pokebridge.mailbox.memory import MemoryMailbox
from pokebridge.model import Feed, NewMessage, Poke, Selection
from pokebridge.processor import Processor
from pokebridge.publisher import Publisher
from pokebridge.tracing import MAX_PENDING, TraceContextMiddleware, Tracing, open_tracing
from pokebridge.transport.base import Signal
from pokebridge.transport.memory import MemoryTransport
from pokebridge.wire import decode_signal, encode_disconnect, encode_pokes, encode_probe
from tests.support import wait_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"

MESSAGE = NewMessage("urn:user:bob", "urn:user:eve", "once", b"1", has_idempotency_key=True)


class Traced:
    """A :class:`Tracing` whose spans are to be seen."""

    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(ParentBased(sampler), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(provider)

    def spans(self, name: str) -> list[ReadableSpan]:
        """Those that have ended, under this name."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


class Heard:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.tags: list[str | None] = []
        self.gaps: list[str] = []

    def on_signal(self, body: bytes, tag: str | None) -> None:
        """Remember the body and the tag."""
        self.bodies.append(body)
        self.tags.append(tag)

    def on_gap(self, selection: Selection, reason: str) -> None:
        """Remember the reason."""
        self.gaps.append(reason)


class Refusing(MemoryTransport):
    """A transport that accepts nothing."""

    async def publish(self, signals: Sequence[Signal]) -> None:
        """Raise."""
        raise TransportError("not today")


def span_id(span: ReadableSpan) -> int:
    """By which its children know it."""
    assert span.context is not None
    return int(span.context.span_id)


def trace_id(span: ReadableSpan) -> int:
    """What all spans of a trace share."""
    assert span.context is not None
    return int(span.context.trace_id)


def parent_id(span: ReadableSpan) -> int:
    """Whose child it is."""
    assert span.parent is not None
    return span.parent.span_id


async def test_one_trace_from_the_send_to_the_delivery() -> None:
    """Over two instances: the one that sends, and the one that has the session."""
    sender, holder = Traced(), Traced()
    bus, heard = MemoryTransport(), Heard()
    await holder.tracing.over(bus.connect()).subscribe(Feed.ALL, heard)
    publisher = Publisher(sender.tracing.over(bus))
    async with Processor(MemoryMailbox(), publisher) as processor:
        send = sender.tracing.sending(processor.send)
        await send(MESSAGE)
        await wait_until(lambda: bool(heard.bodies))
    await publisher.close()
    (sent,), (poked,), (delivered,) = (
        sender.spans("send"),
        sender.spans("poke"),
        holder.spans("deliver"),
    )
    assert trace_id(sent) == trace_id(poked) == trace_id(delivered)
    assert parent_id(poked) == span_id(sent)
    assert parent_id(delivered) == span_id(poked)


async def test_pokes_asked_for_are_traced() -> None:
    """Each of them, though they travel in one signal; what else is in it is not."""
    traced, heard = Traced(), Heard()
    transport = traced.tracing.over(MemoryTransport())
    await transport.subscribe(Feed.ALL, heard)
    async with Publisher(transport, shard_count=1, linger_s=0.05) as publisher:
        pokes = [Poke("urn:user:bob", 7), Poke("urn:user:eve")]
        traced_publish = traced.tracing.poking(publisher.publish)
        await asyncio.gather(traced_publish(pokes), publisher.poke("urn:user:joe"))
    (body,) = heard.bodies
    assert heard.tags == ["0"]
    assert json.loads(body)["traces"].keys() == {"urn:user:bob", "urn:user:eve"}
    assert len(traced.spans("send")) == 1
    assert len(traced.spans("poke")) == len(traced.spans("deliver")) == 2


async def test_only_who_has_the_recipient_makes_a_span() -> None:
    """In fan-out mode the other instances receive the poke, too, but add no span."""
    traced, heard = Traced(), Heard()
    traced.tracing.is_here = {"urn:user:eve"}.__contains__
    transport = traced.tracing.over(MemoryTransport())
    await transport.subscribe(Feed.ALL, heard)
    async with Publisher(transport) as publisher:
        await traced.tracing.poking(publisher.publish)([Poke("urn:user:bob")])
        assert not traced.spans("deliver")
        await traced.tracing.poking(publisher.publish)([Poke("urn:user:eve")])
        assert len(traced.spans("deliver")) == 1
    assert len(heard.bodies) == 2


async def test_what_is_not_sampled_leaves_no_mark() -> None:
    """The signal is the very bytes that it is without tracing."""
    traced, heard = Traced(ALWAYS_OFF), Heard()
    transport = traced.tracing.over(MemoryTransport())
    await transport.subscribe(Feed.ALL, heard)
    async with Publisher(transport) as publisher:
        await traced.tracing.poking(publisher.publish)([Poke("urn:user:bob", 3)])
    assert heard.bodies == [encode_pokes([Poke("urn:user:bob", 3)])]
    assert not traced.tracing.has_pending()


@pytest.mark.parametrize(
    "pokes",
    [[Poke("urn:user:bob")], [Poke("urn:user:bob", 3)], [Poke("urn:user:bob"), Poke('"},{"', 2)]],
)
def test_a_mark_changes_nothing_else(pokes: list[Poke]) -> None:
    """Who knows nothing of traces reads the same pokes."""
    traced = Traced()
    body = encode_pokes(pokes)
    traced.tracing._begin_poke("urn:user:bob")
    marked, spans = traced.tracing.mark(body)
    assert len(spans) == 1
    assert marked != body
    assert decode_signal(marked) == decode_signal(body) == pokes


@pytest.mark.parametrize(
    "body", [encode_probe("p"), encode_disconnect("urn:user:bob"), b"{", b'{"type":"other"}']
)
def test_other_signals_are_let_through(body: bytes) -> None:
    """Probes, disconnects, and what others put on the topic."""
    traced = Traced()
    traced.tracing._begin_poke("urn:user:bob")
    assert traced.tracing.mark(body) == (body, [])
    assert traced.tracing.has_pending()


async def test_a_refused_publish_is_an_error_of_its_span() -> None:
    """And the caller hears of it; a later poke of the recipient does not carry the old trace."""
    traced = Traced()
    async with Publisher(traced.tracing.over(Refusing())) as publisher:
        with pytest.raises(TransportError, match="not today"):
            await traced.tracing.poking(publisher.publish)([Poke("urn:user:bob")])
    (poked,), (sent,) = traced.spans("poke"), traced.spans("send")
    assert poked.status.status_code is sent.status.status_code is StatusCode.ERROR
    assert not traced.tracing.has_pending()


async def test_a_duplicate_owes_no_poke() -> None:
    """The same message again is not poked again, so nothing waits for it."""
    traced, mailbox = Traced(), MemoryMailbox()
    processor = Processor(mailbox, Publisher(MemoryTransport()))
    send = traced.tracing.sending(processor.send)
    assert not (await send(MESSAGE)).duplicate
    traced.tracing._pending.clear()
    assert (await send(MESSAGE)).duplicate
    assert not traced.tracing.has_pending()


def test_waiting_pokes_are_bounded_and_merged() -> None:
    """The newest of a recipient, and at most so many recipients."""
    traced = Traced()
    for number in range(MAX_PENDING + 5):
        traced.tracing._begin_poke(f"urn:user:{number}")
    traced.tracing._begin_poke("urn:user:9")
    assert len(traced.tracing._pending) == MAX_PENDING
    assert len(traced.spans("poke")) == 6


@pytest.mark.parametrize(
    "traces",
    ["7", "[]", '{"urn:user:bob":7}', '{"urn:user:bob":"00-zz-zz-01"}', "{}", '{"\xff":""}', "{"],
)
async def test_nonsense_for_traces_never_harms(traces: str) -> None:
    """The receiver still gets the body."""
    traced, heard = Traced(), Heard()
    bus = MemoryTransport()
    await traced.tracing.over(bus).subscribe(Feed.ALL, heard)
    body = b'{"traces":' + traces.encode("latin-1") + b',"recipient":"urn:user:bob"}'
    await bus.publish([Signal(body)])
    assert heard.bodies == [body]
    assert heard.tags == [None]


async def test_the_rest_of_the_port_is_the_transports() -> None:
    """Gaps and closing go through."""
    traced, heard, bus = Traced(), Heard(), MemoryTransport()
    transport = traced.tracing.over(bus)
    await transport.subscribe(Feed.ALL, heard)
    next(iter(bus._bus)).receiver.on_gap(Feed.ALL, "cut")
    assert heard.gaps == ["cut"]
    await transport.close()
    with pytest.raises(TransportError):
        await transport.publish([])


# --- HTTP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [TRACEPARENT, "nonsense", None])
async def test_the_callers_trace_goes_on(header: str | None) -> None:
    """A valid ``traceparent`` makes the send part of the caller's trace. Else it starts one."""
    traced = Traced()

    async def nothing(_: Sequence[Poke]) -> None:
        """Publish nowhere."""

    async def call(_scope: Scope, _receive: Receive, send: Send) -> None:
        await traced.tracing.poking(nothing)([])
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": []})
        await send({"type": "http.response.body"})

    app = TraceContextMiddleware(call)
    headers = {"traceparent": header} if header else {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/", headers=headers)).status_code == HTTPStatus.OK
    (sent,) = traced.spans("send")
    assert (f"{trace_id(sent):032x}" == TRACE_ID) == (header == TRACEPARENT)


# --- the collector ------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """The address of an OTLP endpoint, and what it was sent."""
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        """Takes everything."""

        def do_POST(self) -> None:
            """Keep the body."""
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(HTTPStatus.OK)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


async def test_spans_reach_a_collector(
    collector: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the latest when it is closed, with the instance's name and without the recipient's."""
    address, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    tracing = await asyncio.to_thread(open_tracing, "b1")
    async with Publisher(tracing.over(MemoryTransport())) as publisher:
        await tracing.poking(publisher.publish)([Poke("urn:user:bob")])
    await tracing.close()
    export = b"".join(received)
    assert b"pokebridge" in export
    assert b"b1" in export
    assert b"poke" in export
    assert b"bob" not in export
