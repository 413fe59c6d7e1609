"""OpenTelemetry traces: send, poke, deliver, across instances (extra ``otel``).

    send      a message is committed, or pokes are requested
    └─ poke       from then until the transport has accepted the poke
       └─ deliver     an instance that has sessions of the recipient handles the poke

Tracing costs nothing when it is off: a :class:`Tracing` wraps the transport and the calls that
start a trace, and an instance without tracing wraps nothing.

Between processes the context travels in the signal's body, in ``traces``, a map from recipient to
W3C ``traceparent``. The key is the first of the body, where it is found without parsing. A receiver
that does not know the key ignores it. No span names a recipient.
"""

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Annotated

import msgspec
from opentelemetry import context as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pokebridge.asgi import ASGIApp, Receive, Scope, Send
from pokebridge.errors import SignalError
from pokebridge.model import (
    NewMessage,
    Poke,
    PublishPokes,
    Receipt,
    Selection,
    SendMessage,
)
from pokebridge.transport.base import HasLimit, Receiver, Signal, Subscription, Transport
from pokebridge.wire import Beacon, Disconnect, Lookup, Probe, decode_signal

# Sampled pokes that wait to be published. Beyond this number the oldest is no longer traced.
MAX_PENDING = 1000
# As many as a publisher puts into a signal.
_MAX_TRACES_PER_SIGNAL = 500
_START = b'{"traces":'

_propagator = TraceContextTextMapPropagator()


class _Traces(msgspec.Struct):
    traces: Annotated[dict[str, str], msgspec.Meta(max_length=_MAX_TRACES_PER_SIGNAL)] = {}


_decode_traces = msgspec.json.Decoder(_Traces).decode


def open_tracing(instance: str) -> "Tracing":
    """Return a tracing that exports to an OTLP collector over HTTP.

    OpenTelemetry's own variables configure it: ``OTEL_EXPORTER_OTLP_ENDPOINT``,
    ``OTEL_TRACES_SAMPLER``, ``OTEL_RESOURCE_ATTRIBUTES`` and so on. A thread sends the spans. They
    are dropped if the collector does not keep up. Call it outside the event loop, because it
    blocks while it inspects the machine.
    """
    resource = Resource.create({SERVICE_NAME: "pokebridge", SERVICE_INSTANCE_ID: instance})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Wraps the parts of an instance, or of a backend, that a trace passes through.

    ``is_here`` says whether a recipient has sessions on this instance. Other recipients' pokes get
    no span.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pokebridge")
        self._pending: dict[str, Span] = {}
        self.is_here: Callable[[str], bool] = lambda _: True

    @property
    def middleware(self) -> Callable[[ASGIApp], ASGIApp]:
        """ASGI middleware that continues the caller's trace."""
        return TraceContextMiddleware

    async def close(self) -> None:
        """Send the remaining spans to the collector, within the exporter's timeouts."""
        for span in self._pending.values():
            span.end()
        self._pending.clear()
        await asyncio.to_thread(self._provider.shutdown)

    # --- where a trace starts -------------------------------------------------------------------

    def sending(self, send: SendMessage) -> SendMessage:
        """Wrap ``Processor.send``. The span of the owed poke begins when it returns."""

        async def traced(message: NewMessage) -> Receipt:
            with self._tracer.start_as_current_span("send", kind=SpanKind.PRODUCER):
                receipt = await send(message)
                if not receipt.duplicate:
                    self._begin_poke(message.recipient)
                return receipt

        return traced

    def poking(self, publish: PublishPokes) -> PublishPokes:
        """Wrap ``Publisher.publish``."""

        async def traced(pokes: Sequence[Poke]) -> None:
            with self._tracer.start_as_current_span("send", kind=SpanKind.PRODUCER):
                for poke in pokes:
                    self._begin_poke(poke.recipient)
                try:
                    await publish(pokes)
                except BaseException:
                    for poke in pokes:  # otherwise a later poke would carry them
                        self._end_poke(poke.recipient)
                    raise

        return traced

    def _begin_poke(self, recipient: str) -> None:
        self._end_poke(recipient)  # merged: the newer poke replaces the older one
        span = self._tracer.start_span("poke", kind=SpanKind.PRODUCER)
        if not span.is_recording():
            return
        if len(self._pending) >= MAX_PENDING:
            self._end_poke(next(iter(self._pending)))
        self._pending[recipient] = span

    def _end_poke(self, recipient: str) -> None:
        if span := self._pending.pop(recipient, None):
            span.end()

    # --- over the transport ---------------------------------------------------------------------

    def over(self, transport: Transport) -> Transport:
        """Wrap ``transport``, so that signals carry the traces of their pokes."""
        return _TracedTransport(transport, self)

    def has_pending(self) -> bool:
        """Whether a traced poke waits to be published."""
        return bool(self._pending)

    def mark(self, body: bytes) -> tuple[bytes, list[Span]]:
        """Return ``body`` with the contexts of its pokes, and their spans for the caller to end."""
        try:
            content = decode_signal(body)
        except SignalError:
            return body, []
        if isinstance(content, Disconnect | Probe | Beacon | Lookup):
            return body, []
        spans = {
            poke.recipient: span
            for poke in content
            if (span := self._pending.pop(poke.recipient, None))
        }
        if not spans:
            return body, []
        traces = {recipient: _traceparent(span) for recipient, span in spans.items()}
        marked = _START + msgspec.json.encode(traces) + b"," + body.lstrip()[1:]
        return marked, list(spans.values())

    @contextmanager
    def delivering(self, body: bytes) -> Iterator[None]:
        """Record a span for each traced poke of ``body`` whose recipient is here."""
        try:
            traces = _decode_traces(body).traces
        except (msgspec.DecodeError, ValueError, RecursionError):
            traces = {}  # the bridge judges the rest of the body
        spans = [
            self._tracer.start_span("deliver", _context(traceparent), SpanKind.CONSUMER)
            for recipient, traceparent in traces.items()
            if self.is_here(recipient)
        ]
        try:
            yield
        finally:
            for span in spans:
                span.end()


class _TracedTransport:
    def __init__(self, inner: Transport, tracing: Tracing) -> None:
        self.is_shared = inner.is_shared
        self._inner = inner
        self._tracing = tracing

    @property
    def _limit(self) -> float:
        return self._inner.max_signal_bytes if isinstance(self._inner, HasLimit) else inf

    @property
    def max_signal_bytes(self) -> int:
        """That of the engine. A signal for whose traces there is no room goes without them."""
        return int(min(self._limit, sys.maxsize))

    async def publish(self, signals: Sequence[Signal]) -> None:
        if not self._tracing.has_pending():
            await self._inner.publish(signals)
            return
        spans: list[Span] = []
        marked = []
        for signal in signals:
            body, its_spans = self._tracing.mark(signal.body)
            marked.append(Signal(body, signal.shard) if len(body) <= self._limit else signal)
            spans += its_spans
        try:
            await self._inner.publish(marked)
        except BaseException:
            for span in spans:
                span.set_status(StatusCode.ERROR, "the transport did not accept the signal")
            raise
        finally:
            for span in spans:
                span.end()

    async def subscribe(self, selection: Selection, receiver: Receiver) -> Subscription:
        return await self._inner.subscribe(selection, _TracedReceiver(receiver, self._tracing))

    async def close(self) -> None:
        await self._inner.close()


class _TracedReceiver:
    def __init__(self, inner: Receiver, tracing: Tracing) -> None:
        self._inner = inner
        self._tracing = tracing

    def on_signal(self, body: bytes, tag: str | None) -> None:
        if not body.startswith(_START):
            self._inner.on_signal(body, tag)
            return
        with self._tracing.delivering(body):
            self._inner.on_signal(body, tag)

    def on_gap(self, selection: Selection, reason: str) -> None:
        self._inner.on_gap(selection, reason)


class TraceContextMiddleware:
    """ASGI middleware: a request's ``traceparent`` is the parent of the spans that it causes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request within the caller's trace."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        token = otel.attach(_propagator.extract(headers))
        try:
            await self._app(scope, receive, send)
        finally:
            otel.detach(token)


def _traceparent(span: Span) -> str:
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, set_span_in_context(span))
    return carrier["traceparent"]


def _context(traceparent: str) -> Context:
    """The remote parent, or an empty context, which begins a new trace, if it is invalid."""
    return _propagator.extract({"traceparent": traceparent}, Context())
