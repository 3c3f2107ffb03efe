"""The port for Prometheus: `GET /metrics`, and the probes of processes that speak no other HTTP.

A listener of its own, beside the API and never through it: whoever reaches the port may read, so that a scraper inside
the cluster needs no key and an ingress in front of the API cannot give it away. Off unless a port is set.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from registry.metrics import METRICS

log = structlog.get_logger(__name__)

Answer = tuple[int, dict[str, Any]]
"""HTTP status and JSON body."""


class _Process(Collector):
    """The instruments of this process, in a registry that also has an application's own state."""

    def collect(self) -> Iterable[Metric]:
        return METRICS.collect()


def exported(*collectors: Collector) -> CollectorRegistry:
    """Everything that a process exports: its counters, and what `collectors` read when asked."""
    registry = CollectorRegistry()
    for collector in (_Process(), *collectors):
        registry.register(collector)
    return registry


class _Handler(WSGIRequestHandler):
    timeout = 10  # a scraper that says nothing holds a thread no longer than this

    def log_message(self, format: str, *args: Any) -> None:
        """Probes and scrapes are no news."""


class _Server(ThreadingWSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


@contextmanager
def listening(host: str, port: int, *, registry: CollectorRegistry, probes: dict[str, Callable[[], Answer]] | None = None) -> Iterator[int]:
    """Answer on `host` and `port` inside the block; 0: not at all. Yields the port.

    `probes`: path -> what to answer there, beside `/metrics`. Raises OSError naming the address where it is taken.
    """
    if not port:
        yield 0
        return
    server_class = _Server6 if ":" in host else _Server
    try:
        server = make_server(host, port, _application(registry, probes or {}), server_class=server_class, handler_class=_Handler)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port} for metrics (LORARY_METRICS_PORT): {error.strerror or error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics.listening", host=host, port=server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _application(registry: CollectorRegistry, probes: dict[str, Callable[[], Answer]]) -> Callable[..., Iterable[bytes]]:
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        status, body = probes[path]() if path in probes else (404, {"detail": f"nothing answers at {path!r:.80}"})
        start_response(f"{status} {'OK' if status == 200 else 'no'}", [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]

    return application
