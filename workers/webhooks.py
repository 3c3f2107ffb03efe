"""The deliverer: threads beside the jobs of a worker process that claim, send and mark webhook deliveries.

A slow receiver holds one thread for `total_s` at most, and no endpoint is served by two threads at once.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from registry import metrics
from registry.config import Settings
from registry.db import Database, database_time
from registry.outbound import OutboundClient, make_outbound_client
from registry.sealing import Sealer, make_sealer
from registry.webhooks import delivery, repository
from registry.webhooks.delivery import DeliveryLimits

log = structlog.get_logger(__name__)

PURGE_EVERY_S = 3600.0


class Deliverer:
    """Any number of processes share a database: claims keep them apart."""

    def __init__(
        self,
        database: Database,
        *,
        client: OutboundClient,
        sealer: Sealer,
        limits: DeliveryLimits,
        num_threads: int = 4,
        poll_s: float = 1.0,
        retention_s: float = 30 * 86_400.0,
    ) -> None:
        self._database = database
        self._client = client
        self._sealer = sealer
        self._limits = limits
        self._num_threads = num_threads
        self._poll_s = poll_s
        self._retention_s = retention_s
        self._purged_at = time.monotonic() - PURGE_EVERY_S
        self._threads: list[threading.Thread] = []

    def start(self, stop: threading.Event) -> None:
        """Deliver in threads until `stop` is set; then `join`."""
        self._threads = [
            threading.Thread(target=self._run, args=(stop, number), name=f"webhooks-{number}", daemon=True)
            for number in range(self._num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for the deliveries under way: `total_s` at most."""
        for thread in self._threads:
            thread.join()

    def _run(self, stop: threading.Event, number: int) -> None:
        while not stop.is_set():
            try:
                if number == 0:
                    self._purge_sometimes()
                worked = self.run_one()
            except SQLAlchemyError as error:
                log.warning("webhook.database_away", error=str(error))
                worked = False
            if not worked:
                stop.wait(self._poll_s)

    def run_one(self) -> bool:
        """Make one attempt at one delivery. False where none is due."""
        with self._database.system_read() as session:
            if not repository.any_due(session):
                return False
        with self._database.system_write() as session:
            claimed = delivery.claim(session, self._limits)
        if claimed is None:
            return False
        outcome = delivery.send(claimed, self._client, self._sealer, total_s=self._limits.total_s)
        with self._database.system_write() as session:
            state = delivery.keep(session, claimed, outcome, self._limits)
        metrics.webhook_attempts.labels(state or "lost").inc()
        facts = {"webhook_id": claimed.endpoint_id, "event_id": claimed.event_id, "attempt": claimed.attempt}
        log.info("webhook.attempted", state=state or "lost", status=outcome.status, error=outcome.error, **facts)
        return True

    def _purge_sometimes(self) -> None:
        if time.monotonic() - self._purged_at < PURGE_EVERY_S:
            return
        self._purged_at = time.monotonic()
        num_purged = self.purge()
        if num_purged:
            log.info("webhook.purged", num_deliveries=num_purged)

    def purge(self) -> int:
        """Forget what ended longer ago than the log is kept. Returns the number of deliveries."""
        with self._database.system_write() as session:
            return repository.purge(session, before=database_time(session) - dt.timedelta(seconds=self._retention_s))


def build_deliverer(settings: Settings, database: Database) -> Deliverer:
    return Deliverer(
        database,
        client=make_outbound_client(settings),
        sealer=make_sealer(settings),
        limits=DeliveryLimits(max_attempts=settings.webhook_max_attempts, first_retry_s=settings.webhook_first_retry_s),
        poll_s=settings.webhook_poll_s,
        retention_s=settings.webhook_retention_s,
    )


@contextmanager
def delivering(settings: Settings, database: Database, *, stop: threading.Event) -> Iterator[None]:
    """Deliver beside what runs inside the block; at its end `stop` is set and deliveries under way are finished.

    A worker without the secret key can open no signing secret: it leaves deliveries to those that have it.
    """
    if not settings.secret_key.get_secret_value():
        log.warning("webhook.no_secret_key", remedy="give this worker LORARY_SECRET_KEY, or another worker delivers")
        yield
        return
    deliverer = build_deliverer(settings, database)
    deliverer.start(stop)
    try:
        yield
    finally:
        stop.set()
        deliverer.join()
