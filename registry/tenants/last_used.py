"""When each key was last used: gathered in memory, written every few seconds in its own transaction.

Authentication reads; were it to write, every request would queue behind SQLite's one writer.
"""

from __future__ import annotations

import threading

import structlog
from sqlalchemy.exc import SQLAlchemyError

from registry.db import Database
from registry.tenants import repository

log = structlog.get_logger(__name__)


class LastUsed:
    """Thread-safe. `seen` costs a lock and a set insert; `flush` writes what was gathered, or keeps it for later."""

    def __init__(self, database: Database, *, interval_s: float = 10.0) -> None:
        self._database = database
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def seen(self, key_id: str) -> None:
        with self._lock:
            self._seen.add(key_id)

    def flush(self) -> None:
        with self._lock:
            batch, self._seen = self._seen, set()
        if not batch:
            return
        try:
            with self._database.system_write() as session:
                repository.touch_keys(session, batch)
        except SQLAlchemyError as error:
            log.warning("keys.last_used_not_written", num_keys=len(batch), error=type(error).__name__)
            with self._lock:
                self._seen |= batch

    def start(self) -> None:
        assert self._thread is None, "started twice"
        self._thread = threading.Thread(target=self._run, name="last-used", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and write what is left."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self.flush()
