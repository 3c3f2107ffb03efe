"""The sweeper: jobs whose worker is gone are queued again, or given up with a word to the owner of what they were about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from registry import metrics
from registry.db import Database, WriteSession
from registry.jobs import service as jobs

log = structlog.get_logger(__name__)

GiveUp = Callable[[WriteSession, str | None, Mapping[str, Any], str, str], None]
"""Writes what an owner must see when a job ends without a result. It gets the tenant, the payload, a code and a sentence."""


class Sweeper:
    """Sweeps the jobs of the kinds in `give_up`. Any number of them may run: rows are locked one by one."""

    def __init__(self, database: Database, *, give_up: Mapping[str, GiveUp]) -> None:
        self._database = database
        self._give_up = give_up

    def sweep(self) -> None:
        """The job's end and what its owner must see of it commit together. Nothing is locked where nothing is lost."""
        kinds = list(self._give_up)
        with self._database.system_read() as session:
            if not jobs.is_any_lost(session, kinds=kinds):
                return
        with self._database.system_write() as session:
            for job in jobs.sweep(session, kinds=kinds):
                error = job.error if job.state == "failed" and job.error else {"code": "cancelled", "detail": "the job was cancelled"}
                self._give_up[job.kind](session, job.tenant_id, job.payload, error["code"], error["detail"])
                metrics.jobs_given_up.labels(job.kind).inc()
                log.warning("job.given_up", job_id=job.id, kind=job.kind, **error)
