"""What remains to do until nothing is left of a dropped adapter: its files, and pulls that land after all. Step thread only."""

from __future__ import annotations

import logging
from concurrent.futures import Future

from gpu_runtime.adapters.flights import Flights
from gpu_runtime.adapters.handle import Drop
from gpu_runtime.adapters.pull import Puller
from gpu_runtime.core import AdapterKey

log = logging.getLogger(__name__)


class Forgetting:
    """Sees to files and flights of drops; pages and handles are the residency's."""

    def __init__(self, *, puller: Puller, flights: Flights) -> None:
        self._puller = puller
        self._flights = flights
        self._drops: list[tuple[AdapterKey, Drop]] = []

    def begin(self, key: AdapterKey, drop: Drop) -> None:
        """`drop` waits for the pull of `key` that is under way, if any, and for its files to be gone."""
        if self._flights.abandon(key):
            drop.wait_for()
            self._drops.append((key, drop))
        self._forget_files(key, drop)

    def landed(self, key: AdapterKey) -> None:
        """A dropped pull has landed; it may have written its files after they were removed."""
        if self._flights.has_unwanted(key):
            return
        finished = [drop for dropped, drop in self._drops if dropped == key]
        self._drops = [(dropped, drop) for dropped, drop in self._drops if dropped != key]
        for drop in finished:
            self._forget_files(key, drop)
            drop.one_done()

    def _forget_files(self, key: AdapterKey, drop: Drop) -> None:
        drop.wait_for()

        def forgotten(outcome: Future[None]) -> None:
            if not outcome.cancelled() and (error := outcome.exception()) is not None:
                log.error("adapter.files_remain", extra={"tenant": key.tenant, "form_digest": key.form_digest}, exc_info=error)
            drop.one_done()

        self._flights.run_aside(lambda: self._puller.forget(key)).add_done_callback(forgotten)
