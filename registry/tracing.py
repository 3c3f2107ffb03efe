"""OpenTelemetry of the control plane: where spans go, and how a trace crosses a table, a broker and a process.

FastAPI makes the spans of requests by itself; jobs, hints and offers to replicas get theirs here. Without
OTEL_EXPORTER_OTLP_ENDPOINT nothing is recorded and nothing is imported but the API. Attributes name tenants by id, jobs
and replicas; never a key, a body or a prompt.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import structlog
from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

log = structlog.get_logger(__name__)

TRACEPARENT = "traceparent"
FLUSH_S = 3.0
_UNSEEN = frozenset({"/livez", "/readyz"})
_w3c = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("lorary")

APPLICATION: TelemetryConfig = {
    "metrics": False,  # Prometheus has them
    "logs": False,  # they would carry exceptions' messages, which may quote a request
    "operation_spans": False,
    "auto_configure": False,
    "exclude": lambda scope: scope.get("path") in _UNSEEN,
}
"""How FastAPI's own telemetry is set."""


def start_tracing(service: str, *, wanted: bool) -> None:
    """Export spans as OTEL_* variables say, under `service` unless they name another. Once a process, before its work."""
    if not wanted:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - of the extra [otel]
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        log.warning("tracing.not_installed", remedy="pip install 'lorary[otel]', or unset OTEL_EXPORTER_OTLP_ENDPOINT")
        return
    ours = Resource.create({"service.name": service, "service.version": version("lorary")})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def flush_tracing() -> None:
    """Send what is held, for a few seconds at most: a collector that is away holds no process up."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is None:
        return
    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(FLUSH_S)


def current_traceparent() -> str | None:
    """The span at hand in W3C's form, to be stored or sent; None where nothing is traced."""
    carrier: dict[str, str] = {}
    _w3c.inject(carrier)
    return carrier.get(TRACEPARENT)


@contextmanager
def span(name: str, *, kind: SpanKind, attributes: Mapping[str, str | int | None], parent: str | None = None) -> Iterator[Span]:
    """A span around the block, under `parent` (a traceparent) or the span at hand. An error is named by its type alone."""
    context = None if parent is None else _w3c.extract({TRACEPARENT: parent})
    given: dict[str, Any] = {key: value for key, value in attributes.items() if value is not None}
    with _tracer.start_as_current_span(
        name, context=context, kind=kind, attributes=given, record_exception=False, set_status_on_exception=False
    ) as made:
        whole = False
        try:
            yield made
            whole = True
        finally:
            error = sys.exc_info()[0]
            if not whole and error is not None:
                fail_span(made, error.__name__)


def end_job(outcome: str) -> None:
    """Tell the span at hand, a job's, how its attempt ended."""
    made = trace.get_current_span()
    made.set_attribute("lorary.job.outcome", outcome)
    if outcome in {"failed", "retried", "lost", "interrupted"}:
        fail_span(made, outcome)


def fail_span(made: Span, error_type: str) -> None:
    made.set_attribute("error.type", error_type)
    made.set_status(StatusCode.ERROR)
