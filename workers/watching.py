"""How a worker process is watched: its metrics and its probes, on a port of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from registry.blobs.service import open_blob_store
from registry.config import Settings
from registry.db import Database
from registry.metrics_listener import Answer, exported, listening
from registry.readiness import Readiness, make_readiness
from registry.state_metrics import state_collectors


@contextmanager
def watched(settings: Settings, database: Database, *, stop: threading.Event) -> Iterator[None]:
    """`/metrics`, `/livez` and `/readyz` inside the block, where a port is set. Once `stop` is set the process is not ready."""
    readiness = make_readiness(settings, database, open_blob_store(settings))
    probes = {"/livez": lambda: (200, {"status": "ok"}), "/readyz": lambda: _readyz(readiness, stop)}
    registry = exported(*state_collectors(settings, database, readiness))
    with listening(settings.metrics_host, settings.metrics_port, registry=registry, probes=probes):
        yield


def _readyz(readiness: Readiness, stop: threading.Event) -> Answer:
    if stop.is_set():
        readiness.drain()
    report = readiness.report()
    return 200 if report.is_ready else 503, {"status": report.status, "checks": report.checks}
