"""When traces are recorded, and that log lines name them. What is exported: `tests/e2e/test_traces.py`, `tests/workers/test_broker.py`."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from gpu_runtime.config import tracing_wanted as wanted_by_runtime
from gpu_runtime.server.logs import trace_ids as runtime_ids
from registry.config import tracing_wanted
from registry.logging import trace_ids
from registry.tracing import current_traceparent

SPAN = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)))


@pytest.mark.parametrize("wanted", [tracing_wanted, wanted_by_runtime])
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_opentelemetrys_own_variables_decide(wanted: Any, environ: dict[str, str], expected: bool) -> None:
    assert wanted(environ) is expected


@pytest.mark.parametrize("processor", [trace_ids, runtime_ids])
def test_log_lines_name_their_trace_where_there_is_one(processor: Any) -> None:
    assert processor(None, "info", {"event": "x"}) == {"event": "x"}
    with use_span(SPAN):
        assert processor(None, "info", {"event": "x"}) == {"event": "x", "trace_id": f"{0xABC:032x}", "span_id": f"{0xDEF:016x}"}


def test_a_traceparent_is_w3cs() -> None:
    assert current_traceparent() is None
    with use_span(SPAN):
        assert current_traceparent() == f"00-{0xABC:032x}-{0xDEF:016x}-01"
