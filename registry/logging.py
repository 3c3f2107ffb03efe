"""Structured logs: one event a line, with the request's id, tenant and key; standard-library loggers pass through.

Nothing that looks like an API key or a grant reaches a log, whoever put it there.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from contextlib import nullcontext, suppress
from typing import Any, TextIO

import structlog
from opentelemetry import trace
from structlog.typing import Processor

REDACTED = "[redacted]"
_SECRET = re.compile(r"lry_[0-9A-Za-z]+_[0-9A-Za-z]+|eyJ[\w-]+\.[\w-]+\.[\w-]+")
_SECRET_KEYS = frozenset({"authorization", "token", "secret", "secret_key", "password", "grant", "api_key"})
_NOISE = frozenset({"color_message"})  # uvicorn's own event once more, with escape codes
_QUIET_LOGGERS = ("httpx2", "httpcore2", "alembic", "uvicorn.access", "asyncio")


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor; also walks into lists and dicts."""
    return {key: _clean(key, value) for key, value in event.items() if key not in _NOISE}


def _clean(key: str, value: Any) -> Any:
    if key.lower() in _SECRET_KEYS:
        return REDACTED
    if isinstance(value, str):
        return _SECRET.sub(REDACTED, value)
    if isinstance(value, dict):
        return {inner: _clean(str(inner), item) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean("", item) for item in value]
    return value


def trace_ids(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: which trace a line belongs to, where there is one."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


class _Lines:
    """Where structlog's lines go: straight to the handler's stream. A record of the standard library around each of them
    costs more than everything else about the line."""

    def __init__(self, handler: logging.StreamHandler[TextIO], name: str) -> None:
        self._handler = handler
        self.name = name

    def msg(self, line: str) -> None:
        # A reader of the log that went away must not end a request, as it does not with the standard library.
        with self._handler.lock or nullcontext(), suppress(OSError, ValueError):
            self._handler.stream.write(line + "\n")
            self._handler.flush()

    debug = info = warning = error = critical = msg


def configure_logging(*, format: str = "json", level: str = "INFO") -> None:
    """Set up structlog and the standard library's root logger, on stderr. Call it once, in a process's main."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        trace_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = _rendering(format)
    handler = logging.StreamHandler(sys.stderr)
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    foreign: list[Processor] = [*shared, structlog.stdlib.ExtraAdder()]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=foreign, processors=[strip, *rendering]))
    structlog.configure(
        processors=[*shared, *rendering],
        logger_factory=lambda *names: _Lines(handler, names[0] if names else "lorary"),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def _rendering(format: str) -> list[Processor]:
    """From an event to its line."""
    if format == "console":
        return [structlog.processors.format_exc_info, redact, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    return [structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer(default=str)]
