"""`python -m workers`: one worker process. SIGTERM or SIGINT finishes the job in hand, then ends."""

from __future__ import annotations

import signal
import sys
import threading

from registry.blobs.service import open_blob_store
from registry.config import Settings, load_settings
from registry.db import Database, open_database
from registry.jobs.service import IMPORT_BASE_MODEL, VALIDATE_VERSION
from registry.logging import configure_logging
from workers.importing import BaseModelImport
from workers.shell import JobKind, Worker
from workers.validate import Validation


def build_worker(settings: Settings, database: Database) -> Worker:
    """A worker for every kind of job."""
    store = open_blob_store(settings)
    store.remove_stale_uploads()
    validation = Validation(database, store, max_rank=settings.max_adapter_rank)
    importing = BaseModelImport(settings.model_dir)
    kinds = {
        VALIDATE_VERSION: JobKind(run=validation.run, give_up=validation.give_up),
        IMPORT_BASE_MODEL: JobKind(run=importing.run, give_up=importing.give_up),
    }
    return Worker(database, kinds=kinds, lease_s=settings.job_lease_s, poll_s=settings.job_poll_s)


def main() -> int:
    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    database = open_database(settings)
    try:
        build_worker(settings, database).run(stop)
    finally:
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
