"""The relay: takes job hints from the outbox, publishes them, deletes them. `python -m workers.outbox` runs one alone.

Take, publish and delete are three steps: no transaction is open while the broker is spoken to. A relay that is killed
between publishing and deleting leaves hints that another one publishes again, which is harmless: the row of the job
decides. Any number of relays may run.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import structlog
from opentelemetry.trace import SpanKind
from sqlalchemy.exc import SQLAlchemyError

from registry import metrics, tracing
from registry.config import load_settings, tracing_wanted
from registry.db import Database, open_database
from registry.jobs import outbox
from registry.jobs.outbox import Hint
from registry.logging import configure_logging
from workers.watching import watched

log = structlog.get_logger(__name__)

BATCH = 100
HOLD_S = 30.0
BROKER_PAUSE_S = 2.0
POLL_S = 0.2


class BrokerAway(Exception):
    """The broker did not take a hint."""


class Relay:
    """`publish` raises BrokerAway. A hint that it holds goes to another relay after `hold_s`."""

    def __init__(self, database: Database, publish: Callable[[Hint], None], *, hold_s: float = HOLD_S) -> None:
        self._database = database
        self._publish = publish
        self._hold_s = hold_s

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set. A database or a broker that is away is waited for."""
        while not stop.is_set():
            try:
                pause_s = 0.0 if self.relay() == BATCH else POLL_S
            except BrokerAway as error:
                metrics.relay_failures.labels("broker").inc()
                log.warning("outbox.broker_away", error=str(error))
                pause_s = BROKER_PAUSE_S
            except SQLAlchemyError as error:
                metrics.relay_failures.labels("database").inc()
                log.warning("outbox.database_away", error=str(error))
                pause_s = BROKER_PAUSE_S
            stop.wait(pause_s)

    def relay(self) -> int:
        """Publish what is due; how many hints that were. Raises BrokerAway, with the rest put back."""
        with self._database.system_read() as session:
            if not outbox.is_anything_due(session):
                return 0
        with self._database.system_write() as session:
            hints = outbox.take(session, limit=BATCH, hold_s=self._hold_s)
        for position, hint in enumerate(hints):
            try:
                self._publish_traced(hint)
            except BrokerAway:
                self._put_back(hints[position:])
                raise
            self._settle(hint)
        return len(hints)

    def _publish_traced(self, hint: Hint) -> None:
        """A hint of a traced request has a span, and the message names it."""
        if hint.traceparent is None:
            self._publish(hint)
            return
        attributes = {"lorary.job.id": hint.job_id, "messaging.destination.name": hint.queue}
        with tracing.span("job.publish", kind=SpanKind.PRODUCER, attributes=attributes, parent=hint.traceparent):
            self._publish(replace(hint, traceparent=tracing.current_traceparent() or hint.traceparent))

    def _settle(self, hint: Hint) -> None:
        with self._database.system_write() as session:
            outbox.settle(session, hint)
        metrics.hints_published.inc()
        metrics.relay_lag_seconds.observe(hint.due_for_s)
        log.info("outbox.published", job_id=hint.job_id, queue=hint.queue)

    def _put_back(self, hints: list[Hint]) -> None:
        with self._database.system_write() as session:
            for hint in hints:
                outbox.put_back(session, hint, retry_in_s=0)


def main() -> int:
    from workers.app import make_publisher  # noqa: PLC0415 - Celery, which only this program and workers with a broker need

    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    if not settings.has_broker:
        sys.stderr.write("LORARY_BROKER_URL is not set, so there is nowhere to publish job hints to\n")
        return 2
    tracing.start_tracing("lorary-relay", wanted=tracing_wanted())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = open_database(settings)
    try:
        with watched(settings, database, stop=stop):
            Relay(database, make_publisher(settings)).run(stop)
    finally:
        database.close()
        tracing.flush_tracing()
    return 0


if __name__ == "__main__":
    sys.exit(main())
