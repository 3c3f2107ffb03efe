"""News of jobs for whoever watches them: one poller a process, however many watchers.

A watcher holds no session and no thread while it waits. The poller asks, in one statement for all watched jobs, which have
events that its watchers have not seen, and reads those.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from registry.db import Database
from registry.jobs import repository
from registry.jobs.models import FINAL
from registry.jobs.schemas import JobEventOut

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 10.0
MAX_STREAM_S = 600.0
"""A stream ends after this; clients come back with Last-Event-ID, and with a key that is checked again."""
BATCH = 500
"""Events of one job that one look reads."""
MAX_BEHIND = 64
"""Deliveries that a slow reader may leave lying before its stream ends."""

News = list[JobEventOut]


class Watcher:
    """One reader of one job's events above number `seen`."""

    def __init__(self, job_id: str, *, seen: int) -> None:
        self.job_id = job_id
        self.seen = seen
        self._news: asyncio.Queue[News | None] = asyncio.Queue()

    async def next(self, *, timeout_s: float) -> News | None:
        """What happened since; empty after `timeout_s`; None when the stream must end."""
        try:
            return await asyncio.wait_for(self._news.get(), timeout_s)
        except TimeoutError:
            return []

    def tell(self, events: Sequence[JobEventOut]) -> None:
        fresh = [event for event in events if event.number > self.seen]
        if self._news.qsize() >= MAX_BEHIND:
            self.end()
        elif fresh:
            self.seen = fresh[-1].number
            self._news.put_nowait(fresh)

    def end(self) -> None:
        self._news.put_nowait(None)


class JobWatch:
    """The watchers of one process. Used on the event loop only; `close` may be called from anywhere."""

    def __init__(self, database: Database, *, poll_s: float, max_watchers: int) -> None:
        self._database = database
        self._poll_s = poll_s
        self._max_watchers = max_watchers
        self._watchers: set[Watcher] = set()
        self._poller: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def is_full(self) -> bool:
        return self._closing or len(self._watchers) >= self._max_watchers

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def close(self) -> None:
        """End every stream at the next look: the process drains."""
        self._closing = True

    @contextmanager
    def watch(self, job_id: str, *, seen: int) -> Iterator[Watcher]:
        watcher = Watcher(job_id, seen=seen)
        self._watchers.add(watcher)
        if self._poller is None or self._poller.done():
            # In a context of its own: the request that happens to start it leaves it neither its id nor its tenant.
            self._poller = asyncio.create_task(self._poll(), context=contextvars.Context())
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def _poll(self) -> None:
        try:
            while self._watchers and not self._closing:
                await asyncio.sleep(self._poll_s)
                await self._try_look()
        finally:  # whatever ended us: nobody waits for news that no one brings
            for watcher in self._watchers:
                watcher.end()

    async def _try_look(self) -> None:
        try:
            await self._look()
        except SQLAlchemyError as error:
            log.warning("jobs.watch_failed", error=str(error))

    async def _look(self) -> None:
        seen: dict[str, int] = {}
        for watcher in self._watchers:
            seen[watcher.job_id] = min(watcher.seen, seen.get(watcher.job_id, watcher.seen))
        if not seen:
            return
        news = await run_in_threadpool(self._read_news, seen)
        for watcher in list(self._watchers):
            watcher.tell(news.get(watcher.job_id, ()))

    def _read_news(self, seen: Mapping[str, int]) -> dict[str, News]:
        """Across tenants: who may see which job was settled when its watcher came."""
        news: dict[str, News] = {}
        with self._database.system_read() as session:
            for job_id in repository.with_news(session, seen):
                rows = repository.events_after(session, job_id, number=seen[job_id], limit=BATCH)
                news[job_id] = [JobEventOut.model_validate(row) for row in rows]
        return news


async def stream(watch: JobWatch, job_id: str, *, backlog: News, seen: int) -> AsyncIterator[str]:
    """Server-sent events from `backlog` on, until the job is over, the process drains or the stream is old."""
    ends_at = asyncio.get_running_loop().time() + MAX_STREAM_S
    with watch.watch(job_id, seen=backlog[-1].number if backlog else seen) as watcher:
        news: News | None = backlog
        yield "retry: 1000\n\n"
        while news is not None:
            for event in news:
                yield f"id: {event.number}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
            if is_over(news) or asyncio.get_running_loop().time() >= ends_at:
                return
            news = await watcher.next(timeout_s=KEEP_ALIVE_S)
            if news == []:
                yield ": waiting\n\n"


def is_over(events: Sequence[JobEventOut]) -> bool:
    return bool(events) and events[-1].state in FINAL
