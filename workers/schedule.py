"""Starts a collection when the last one is `gc_every_s` ago: a thread of every worker, and any number of them agree."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from registry.config import Settings
from registry.db import Database
from registry.gc import service

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 60.0


@contextmanager
def collecting(settings: Settings, database: Database, *, stop: threading.Event) -> Iterator[None]:
    """Look beside what runs inside the block whether a collection is due."""
    if not settings.gc_every_s:
        yield
        return
    thread = threading.Thread(target=_run, args=(database, stop), kwargs={"every_s": settings.gc_every_s}, name="gc-schedule", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def start_if_due(database: Database, *, every_s: float) -> bool:
    """A look without a lock first: idle workers must not queue for SQLite's one writer."""
    with database.system_read() as session:
        if not service.is_due(session, every_s=every_s):
            return False
    with database.system_write() as session:
        return service.start_if_due(session, every_s=every_s)


def _run(database: Database, stop: threading.Event, *, every_s: float) -> None:
    while not stop.wait(min(LOOK_EVERY_S, every_s)):
        try:
            if start_if_due(database, every_s=every_s):
                log.info("gc.scheduled")
        except SQLAlchemyError as error:
            log.warning("gc.database_away", error=str(error))
