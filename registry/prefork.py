"""Several processes that serve one socket (`LORARY_API_WORKERS`): start, replace those that die, pass signals on.

Each worker is whole: its own application, pools and metrics port. The parent serves nothing and opens no database.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

import structlog

from registry.app import create_app
from registry.config import Settings, load_settings
from registry.logging import configure_logging
from registry.server import configure, serve

log = structlog.get_logger(__name__)

LOOK_S = 0.5
STABLE_S = 10.0
"""A worker that ends sooner than this counts as broken; so many in a row, and the parent gives up."""
MAX_BROKEN = 6
PR_SET_PDEATHSIG = 1

_spawn = multiprocessing.get_context("spawn")


class Workers:
    """The processes behind one listening socket. Used on the main thread: it takes over SIGTERM and SIGINT."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: dict[int, SpawnProcess] = {}
        self._started_at: dict[int, float] = {}
        self._num_broken = 0
        self._signals: list[int] = []

    def run(self) -> int:
        """Until a signal has ended every worker: 0. 1 when workers break as soon as they start."""
        create_app(self._settings).state.database.close()  # what is wrong in the settings is said once, not by every worker
        self._listener = configure(None, self._settings).bind_socket()
        for wanted in (signal.SIGTERM, signal.SIGINT):
            signal.signal(wanted, self._on_signal)
        for number in range(self._settings.api_workers):
            self._start(number)
        while not self._signals and self._num_broken < MAX_BROKEN:
            wait([process.sentinel for process in self._processes.values()], timeout=LOOK_S)
            self._replace_the_dead()
        broken = not self._signals
        self._stop(self._signals or [signal.SIGTERM])
        return int(broken)

    def _start(self, number: int) -> None:
        process = _spawn.Process(target=_work, args=(self._listener, number), name=f"api.{number}")
        process.start()
        self._processes[number], self._started_at[number] = process, time.monotonic()

    def _replace_the_dead(self) -> None:
        for number, process in list(self._processes.items()):
            if process.is_alive() or self._signals:
                continue
            lived_s = time.monotonic() - self._started_at[number]
            self._num_broken = 0 if lived_s >= STABLE_S else self._num_broken + 1
            log.error("worker.died", worker=number, pid=process.pid, exitcode=process.exitcode, lived_s=round(lived_s, 1))
            self._start(number)

    def _stop(self, signals: list[int]) -> None:
        """Each worker drains by itself; a second signal, which skips its delay, is passed on like the first."""
        self._listener.close()  # ours: the port is closed when the last worker stops taking requests
        while True:
            while signals:
                self._pass_on(signals.pop(0))
            alive = [process for process in self._processes.values() if process.is_alive()]
            if not alive:
                return
            wait([process.sentinel for process in alive], timeout=LOOK_S)

    def _pass_on(self, number: int) -> None:
        for process in self._processes.values():
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)


def _work(listener: socket.socket, number: int) -> None:
    """The main of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all of us; until we serve, the parent decides
    _end_with_parent()
    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    structlog.contextvars.bind_contextvars(worker=number)
    serve(settings, sockets=[listener], number=number)


def _end_with_parent() -> None:
    """A worker whose parent was killed would hold the port without anybody to replace or stop it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        sys.exit(1)
