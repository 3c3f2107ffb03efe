"""`python -m workers`: one worker process. SIGTERM or SIGINT finishes the job in hand, or gives it back, then ends.

With LORARY_BROKER_URL it consumes job hints from the broker and relays the outbox; without, it polls the table of jobs.
"""

from __future__ import annotations

import signal
import sys
import threading

from registry.config import Settings, load_settings, tracing_wanted
from registry.db import Database, open_database
from registry.jobs.service import queue_of
from registry.logging import configure_logging
from registry.tracing import flush_tracing, start_tracing
from workers.kinds import build_kinds
from workers.outbox import Relay
from workers.schedule import collecting
from workers.shell import Worker
from workers.watching import watched
from workers.webhooks import delivering


def build_worker(settings: Settings, database: Database) -> Worker:
    """A worker for every kind of job in the queues that it serves."""
    queues = settings.worker_queues.split(",")
    kinds = {kind: how for kind, how in build_kinds(settings, database).items() if queue_of(kind) in queues}
    return Worker(
        database,
        kinds=kinds,
        lease_s=settings.job_lease_s,
        poll_s=settings.broker_poll_s if settings.has_broker else settings.job_poll_s,
        drain_s=settings.job_drain_s,
        max_running=settings.max_running_jobs_per_tenant,
    )


def main() -> int:
    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    start_tracing("lorary-worker", wanted=tracing_wanted())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = open_database(settings)
    try:
        with (
            watched(settings, database, stop=stop),
            delivering(settings, database, stop=stop),
            collecting(settings, database, stop=stop),
        ):
            _work(settings, database, stop=stop)
    finally:
        database.close()
        flush_tracing()
    return 0


def _work(settings: Settings, database: Database, *, stop: threading.Event) -> None:
    worker = build_worker(settings, database)
    if not settings.has_broker:
        worker.run(stop)
        return
    from workers.app import make_publisher, run_with_broker  # noqa: PLC0415 - Celery is for those who have a broker

    run_with_broker(settings, worker=worker, relay=Relay(database, make_publisher(settings)), stop=stop)


if __name__ == "__main__":
    sys.exit(main())
