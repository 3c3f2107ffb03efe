"""What Prometheus reads of an installation's state: backlogs from the database, replicas, connections, readiness.

Rows are the truth, so backlogs are queries and not counters that drift. They are few, indexed and cached, because every
process of the control plane answers them for the whole installation (dashboards take their maximum). A database that is
away costs a scrape these series, never the scrape.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from registry.config import Settings
from registry.db import Database, ReadSession
from registry.jobs import outbox
from registry.jobs import repository as jobs
from registry.jobs.service import KINDS
from registry.metrics import among
from registry.readiness import Readiness
from registry.serving import repository as serving
from registry.webhooks import repository as webhooks

log = structlog.get_logger(__name__)

STATE_AGE_S = 10.0


class StateMetrics(Collector):
    """`replica_ttl_s`: how long a silent replica still counts as live."""

    def __init__(self, database: Database, *, replica_ttl_s: float, max_age_s: float = STATE_AGE_S) -> None:
        self._database = database
        self._replica_ttl_s = replica_ttl_s
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._found: list[Metric] = []
        self._until = float("-inf")

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known without a query

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if time.monotonic() >= self._until:
                self._found = self._ask()
                self._until = time.monotonic() + self._max_age_s
            found = list(self._found)
        yield from found
        yield from _connections(self._database)

    def _ask(self) -> list[Metric]:
        up = GaugeMetricFamily("lorary_database_up", "Whether the database answered this process's last look at the backlogs.")
        try:
            with self._database.system_read() as session:
                found = [*_jobs(session), *_outbox(session), *_webhooks(session), *self._replicas(session)]
        except SQLAlchemyError as error:
            log.warning("metrics.database_away", error=type(error).__name__)
            found = []
        up.add_metric([], float(bool(found)))
        return [up, *found]

    def _replicas(self, session: ReadSession) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "lorary_replicas", "Replicas by state: live, silent (no heartbeat in time), registered, draining.", labels=["state"]
        )
        counts = serving.num_by_state(session, ttl_s=self._replica_ttl_s)
        for state in ("live", "silent", "registered", "draining"):
            gauge.add_metric([state], counts.get(state, 0))
        yield gauge


class ReadinessMetrics(Collector):
    """The answer of `/readyz`, part by part, so that an alert can name the part."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        checks = self._readiness.report().checks
        gauge = GaugeMetricFamily("lorary_ready", "1 where this part of readiness is good: what `/readyz` says.", labels=["part"])
        for part in self._readiness.parts:
            gauge.add_metric([part], float(checks.get(part, "ok") == "ok"))
        yield gauge


def state_collectors(settings: Settings, database: Database, readiness: Readiness) -> tuple[Collector, ...]:
    return StateMetrics(database, replica_ttl_s=settings.replica_ttl_s), ReadinessMetrics(readiness)


def _jobs(session: ReadSession) -> Iterator[Metric]:
    count = GaugeMetricFamily("lorary_jobs", "Jobs that have not ended, by kind and state.", labels=["kind", "state"])
    oldest = GaugeMetricFamily(
        "lorary_jobs_oldest_queued_seconds", "How long the longest-waiting due job of a kind has waited.", labels=["kind"]
    )
    for backlog in jobs.backlog(session):
        kind = among(backlog.kind, KINDS)
        count.add_metric([kind, backlog.state], backlog.count)
        if backlog.oldest_s is not None:
            oldest.add_metric([kind], backlog.oldest_s)
    yield count
    yield oldest


def _outbox(session: ReadSession) -> Iterator[Metric]:
    count, oldest_s = outbox.backlog(session)
    yield GaugeMetricFamily("lorary_outbox_hints", "Job hints that are due and that the broker does not have.", value=count)
    yield GaugeMetricFamily("lorary_outbox_oldest_seconds", "How long the oldest of them has been due: the relay's lag.", value=oldest_s)


def _webhooks(session: ReadSession) -> Iterator[Metric]:
    count, oldest_s = webhooks.backlog(session)
    yield GaugeMetricFamily("lorary_webhooks_pending", "Webhook deliveries that are due or under way.", value=count)
    yield GaugeMetricFamily("lorary_webhooks_oldest_seconds", "How long the oldest due one has waited.", value=oldest_s)


def _connections(database: Database) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "lorary_database_connections", "Connections of this process by role: in use, or idle in the pool.", labels=["role", "state"]
    )
    limit = GaugeMetricFamily("lorary_database_connections_limit", "The most that a role may have in this process.", labels=["role"])
    for role, engine in _engines(database).items():
        pool = engine.pool
        if isinstance(pool, QueuePool):
            used.add_metric([role, "in_use"], pool.checkedout())
            used.add_metric([role, "idle"], pool.checkedin())
            limit.add_metric([role], pool.size() + max(0, pool._max_overflow))
    yield used
    yield limit


def _engines(database: Database) -> dict[str, Engine]:
    """One pool where there is one role."""
    if database.system_engine is database.engine:
        return {"app": database.engine}
    return {"app": database.engine, "system": database.system_engine}
