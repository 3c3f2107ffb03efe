"""Pulls under way: single flight per (tenant, form digest), bounded threads, results handed to the step thread.

Everything here but the job itself runs on the step thread. A pull thread's only way back is a queue and `wake`.
"""

from __future__ import annotations

import logging
import queue
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gpu_runtime.adapters.image import AdapterImage
from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey

Pull = Callable[[AdapterKey, str | None], AdapterImage]
T = TypeVar("T")

log = logging.getLogger(__name__)


class Executor(Protocol):
    """What runs pulls: a ThreadPoolExecutor, or a test that decides when."""

    def submit(self, job: Callable[[], T], /) -> Future[T]: ...

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...


@dataclass(frozen=True)
class Landing:
    """A finished pull: an image, or why there is none. `wanted` False: the adapter was dropped while it was on its way."""

    key: AdapterKey
    image: AdapterImage | None
    failure: AdapterUnavailable | None
    wanted: bool


@dataclass(eq=False)
class _Flight:
    key: AdapterKey
    grant: str | None
    wanted: bool = True
    fresher_grant: str | None = None  # of a request that came while this pull was under way
    is_second_try: bool = False


class Flights:
    """At most `num_threads` pulls at once; the rest queue in the order in which they were asked for."""

    def __init__(self, pull: Pull, *, executor: Executor, num_threads: int) -> None:
        self._pull = pull
        self._executor = executor
        self._num_threads = num_threads
        self._pending: OrderedDict[AdapterKey, _Flight] = OrderedDict()
        self._flying: dict[AdapterKey, list[_Flight]] = {}
        self._landed: queue.SimpleQueue[tuple[_Flight, Future[AdapterImage]]] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None

    def wake_with(self, wake: Callable[[], None]) -> None:
        """`wake` is called from a pull thread whenever something has landed."""
        self._wake = wake

    def __contains__(self, key: AdapterKey) -> bool:
        return key in self._pending or any(flight.wanted for flight in self._flying.get(key, ()))

    def request(self, key: AdapterKey, *, grant: str | None) -> None:
        """Ask for a pull unless one is on its way."""
        if key not in self:
            self._pending[key] = _Flight(key, grant)

    def refresh(self, key: AdapterKey, *, grant: str | None) -> None:
        """A newer request waits as well: a pull that has not begun takes its grant; one under way may fail and use it then."""
        if (pending := self._pending.get(key)) is not None:
            pending.grant = grant
        for flight in self._flying.get(key, ()):
            flight.fresher_grant = grant

    def withdraw(self, key: AdapterKey) -> None:
        """Nobody waits any more: a pull that has not begun never will."""
        self._pending.pop(key, None)
        for flight in self._flying.get(key, ()):
            flight.fresher_grant = None

    def abandon(self, key: AdapterKey) -> bool:
        """The adapter is dropped: pulls under way land as unwanted. True if there are any."""
        self._pending.pop(key, None)
        for flight in self._flying.get(key, ()):
            flight.wanted = False
        return key in self._flying

    def start(self, *, room: bool, urgent: AdapterKey | None) -> None:
        """Begin pending pulls: `urgent` first and always, the others while the host tier has room for what they bring."""
        if urgent is not None and urgent in self._pending:
            self._pending.move_to_end(urgent, last=False)
        while self._pending and self._num_flying < self._num_threads:
            key = next(iter(self._pending))
            if not room and key != urgent:
                return
            self._begin(self._pending.pop(key))

    def take_landed(self) -> list[Landing]:
        """What has finished since the last call."""
        landings = []
        while not self._landed.empty():
            flight, outcome = self._landed.get()
            flights = self._flying[flight.key]
            flights.remove(flight)
            if not flights:
                del self._flying[flight.key]
            landing = _landing(flight, outcome)
            if _deserves_second_try(flight, landing):
                self._pending[flight.key] = _Flight(flight.key, flight.fresher_grant, is_second_try=True)
                self._pending.move_to_end(flight.key, last=False)
            else:
                landings.append(landing)
        return landings

    def has_unwanted(self, key: AdapterKey) -> bool:
        """Whether pulls of a dropped adapter are still under way."""
        return any(not flight.wanted for flight in self._flying.get(key, ()))

    @property
    def _num_flying(self) -> int:
        return sum(len(flights) for flights in self._flying.values())

    def _begin(self, flight: _Flight) -> None:
        self._flying.setdefault(flight.key, []).append(flight)
        self._executor.submit(lambda: self._pull(flight.key, flight.grant)).add_done_callback(lambda outcome: self._land(flight, outcome))

    def _land(self, flight: _Flight, outcome: Future[AdapterImage]) -> None:
        self._landed.put((flight, outcome))
        self._wake()

    def run_aside(self, job: Callable[[], None]) -> Future[None]:
        """Run a job that may wait for a disk on a pull thread."""
        done = self._executor.submit(job)
        done.add_done_callback(lambda _: self._wake())
        return done

    def close(self) -> None:
        """Begin nothing more; pulls under way end by themselves."""
        self._pending.clear()
        for key in self._flying:
            self.withdraw(key)
        self._executor.shutdown(wait=False, cancel_futures=True)


def _deserves_second_try(flight: _Flight, landing: Landing) -> bool:
    """One expired grant must not fail those who wait with a good one. Once: a registry that is away stays away."""
    failed = landing.failure is not None and landing.failure.retryable
    return failed and flight.wanted and flight.fresher_grant is not None and not flight.is_second_try


def _landing(flight: _Flight, outcome: Future[AdapterImage]) -> Landing:
    if outcome.cancelled():
        return Landing(flight.key, None, AdapterUnavailable("the runtime is shutting down", retryable=True), flight.wanted)
    error = outcome.exception()
    if error is None:
        return Landing(flight.key, outcome.result(), None, flight.wanted)
    return Landing(flight.key, None, _failure(flight.key, error), flight.wanted)


def _failure(key: AdapterKey, error: BaseException) -> AdapterUnavailable:
    """Whatever a source raises costs the requests that wait for this pull, and nothing else."""
    if isinstance(error, AdapterUnavailable):
        return error
    log.error("adapter.pull_failed", extra={"tenant": key.tenant, "form_digest": key.form_digest}, exc_info=error)
    return AdapterUnavailable(f"form {key.form_digest} could not be pulled: {type(error).__name__}", retryable=True)
