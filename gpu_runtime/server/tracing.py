"""OpenTelemetry of a replica: FastAPI continues the registry's trace; generation gets a span with GenAI attributes.

Only counts, digests and ids: never a prompt, a token or a grant.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import structlog
from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey
from registry.wire import GrantClaims

log = structlog.get_logger(__name__)

FLUSH_S = 3.0
OPERATIONS = {"chat": "chat", "completions": "text_completion"}
_UNSEEN = frozenset({"/livez", "/readyz", "/metrics"})
_tracer = trace.get_tracer("lorary")
_w3c = TraceContextTextMapPropagator()
_asking: dict[str, Span] = {}
"""Generations under way by their grant: a pull runs in a thread of its own, and the grant is all that it knows of who asked."""

APPLICATION: TelemetryConfig = {
    "metrics": False,  # Prometheus has them
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
    "exclude": lambda scope: scope.get("path") in _UNSEEN,
}
"""How FastAPI's own telemetry is set."""


def start_tracing(service: str, *, wanted: bool) -> None:
    """Export spans as OTEL_* variables say. The registry's twin: the houses share no code but wire and artifact."""
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
    """Send what is held, for a few seconds at most."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is None:
        return
    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(FLUSH_S)


def start_generation(claims: GrantClaims, *, endpoint: str, grant: str) -> Span:
    """The span of one generation, below the request's; ended by `end_generation`."""
    operation = OPERATIONS[endpoint]
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "lorary",
        "gen_ai.request.model": claims.model,
        "gen_ai.response.id": claims.jti,
        "lorary.tenant.id": claims.tenant,
        "lorary.version_digest": claims.version_digest or "",
        "lorary.form_digest": claims.form_digest or "",
    }
    span = _tracer.start_span(f"{operation} {claims.model}", kind=SpanKind.INTERNAL, attributes=attributes)
    if span.is_recording():
        _asking[grant] = span
    return span


def end_generation(
    span: Span,
    *,
    grant: str,
    num_prompt_tokens: int,
    num_completion_tokens: int,
    finish_reasons: list[str | None],
    first_token_s: float | None,
    error_code: str | None,
) -> None:
    """`first_token_s`: from the request's arrival to its first token; `error_code` None: it went well."""
    _asking.pop(grant, None)
    span.set_attribute("gen_ai.usage.input_tokens", num_prompt_tokens)
    span.set_attribute("gen_ai.usage.output_tokens", num_completion_tokens)
    span.set_attribute("gen_ai.response.finish_reasons", [reason for reason in finish_reasons if reason])
    if first_token_s is not None:
        span.set_attribute("gen_ai.response.time_to_first_chunk", first_token_s)
    if error_code is not None:
        span.set_attribute("error.type", error_code)
        span.set_status(StatusCode.ERROR)
    span.end()


@contextmanager
def pulling(name: str, *, key: AdapterKey, grant: str | None) -> Iterator[dict[str, str]]:
    """A span around one call of a pull, below the generation that waits for it; yields the headers that continue it at the registry."""
    asking = _asking.get(grant or "")
    context = None if asking is None else trace.set_span_in_context(asking)
    attributes = {"lorary.tenant.id": key.tenant, "lorary.form_digest": key.form_digest}
    headers: dict[str, str] = {}
    given = _tracer.start_span(name, context=context, kind=SpanKind.CLIENT, attributes=attributes)
    with trace.use_span(given, end_on_exit=True, record_exception=False, set_status_on_exception=False) as span:
        _w3c.inject(headers)
        try:
            yield headers
        except AdapterUnavailable as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise
