"""Keeps a few programs running: start, watch, restart with backoff, stop in order. Knows nothing of Lorary's parts.

One thread, the main one, does everything but read the children's output. Every child leads its own session, so that
Ctrl-C reaches only us and we decide the order; and the kernel kills it should we die first (`child.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from registry.cli.childlog import ChildLog
from registry.cli.failure import CliFailure

LOOK_S = 0.2


@dataclass(frozen=True)
class Program:
    """What to run. `rank` orders the stop: higher ones go first. `url` is where it listens, for whoever asks."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    rank: int = 0
    url: str | None = None
    niceness: int = 0
    stop_timeout_s: float = 30.0


@dataclass(frozen=True)
class Patience:
    """When to try again and when to give up: `max_crashes` in a row, each within `stable_s` of its start."""

    first_wait_s: float = 0.5
    max_wait_s: float = 20.0
    max_crashes: int = 6
    stable_s: float = 60.0

    def wait_s(self, num_crashes: int) -> float:
        return min(self.max_wait_s, self.first_wait_s * 2.0 ** (num_crashes - 1))


class StopAsked(Exception):
    """SIGTERM or SIGINT arrived while we waited for something."""


class Child:
    """One program and the process that runs it now, if any."""

    def __init__(self, program: Program, log: ChildLog) -> None:
        self.program = program
        self.num_restarts = 0
        self.num_crashes = 0  # in a row
        self.process: subprocess.Popen[bytes] | None = None
        self.restart_at = 0.0
        self._started_at = 0.0
        self._log = log

    def start(self) -> None:
        launcher = (sys.executable, "-m", "registry.cli.child", str(os.getpid()), str(self.program.niceness))
        self.process = subprocess.Popen(  # noqa: S603 - our own programs
            (*launcher, *self.program.command),
            env=dict(self.program.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started_at = time.monotonic()
        assert self.process.stdout is not None, "asked for a pipe"
        self._log.follow(self.program.name, self.process.stdout)

    def reap(self, patience: Patience) -> int | None:
        """The exit status if it has just died; plans its restart."""
        if self.process is None or not self._has_ended():
            return None
        status = self.end()
        lived_s = time.monotonic() - self._started_at
        self.num_crashes = 1 if lived_s >= patience.stable_s else self.num_crashes + 1
        self.restart_at = time.monotonic() + patience.wait_s(self.num_crashes)
        return status

    def terminate(self) -> None:
        """SIGTERM to the process itself. Not Popen.terminate, which would reap what has ended already."""
        if self.process is not None and not self._has_ended():
            os.kill(self.process.pid, signal.SIGTERM)

    def wait(self, timeout_s: float) -> bool:
        """False if it still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self._has_ended():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def end(self) -> int | None:
        """Kill whatever is left of its process group, and reap it. Its exit status, None if it does not run."""
        if self.process is None:
            return None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.process = None
        return status

    def _has_ended(self) -> bool:
        """Looks without reaping: until then its pid, and so the id of its group, belongs to nobody else."""
        if self.process is None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Supervisor:
    """Children in the order in which they were added. `on_change` is called after every start, death and restart."""

    def __init__(self, *, log: ChildLog, tell: Callable[[str], None], patience: Patience | None = None) -> None:
        self.children: list[Child] = []
        self.on_change: Callable[[], None] = lambda: None
        self._log = log
        self._tell = tell
        self._patience = patience or Patience()
        self._num_signals = 0

    @property
    def poll_id(self) -> str:
        """The client's request id of looks at the registry that the log leaves out."""
        return self._log.poll_id

    def add(self, program: Program) -> Child:
        child = Child(program, self._log)
        self.children.append(child)
        child.start()
        self.on_change()
        return child

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float, what: str, child: Child | None = None) -> None:
        """Watch the children until `condition` holds.

        Raises StopAsked on a signal, CliFailure after `timeout_s`, when a child crashes too often, and at the first death
        of `child`: a part that dies before it was ever ready has a wrong configuration, which no restart mends.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._look()
            if child is not None and child.num_crashes:
                raise CliFailure(f"{what} ended before it was ready", remedy="its last lines say why", **self._last_lines(child))
            if time.monotonic() >= deadline:
                raise CliFailure(f"{what} was not ready after {timeout_s:g} s", remedy="its log above says what it waits for")
            time.sleep(LOOK_S)

    def run(self, tick: Callable[[], None], *, every_s: float) -> None:
        """Watch until a signal, calling `tick` now and then. Raises as `wait_until`."""
        next_tick = time.monotonic() + every_s
        while True:
            self._look()
            if time.monotonic() >= next_tick:
                tick()
                next_tick = time.monotonic() + every_s
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """Ask the highest rank to end, wait, kill what does not; then the next. A second signal kills at once."""
        for rank in sorted({child.program.rank for child in self.children}, reverse=True):
            self._stop_rank([child for child in self.children if child.program.rank == rank])
        self._log.join(timeout_s=2.0)

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup a closed terminal is no reason to stop
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._num_signals += 1

    def _look(self) -> None:
        if self._num_signals:
            raise StopAsked
        for child in self.children:
            self._look_at(child)

    def _look_at(self, child: Child) -> None:
        status = child.reap(self._patience)
        if status is not None:
            self._tell(f"{child.program.name} ended with {describe_status(status)}")
            self.on_change()
            self._give_up_on(child)
        elif child.process is None and time.monotonic() >= child.restart_at:
            child.num_restarts += 1
            child.start()
            self._tell(f"{child.program.name} restarted (restart {child.num_restarts})")
            self.on_change()

    def _give_up_on(self, child: Child) -> None:
        if child.num_crashes >= self._patience.max_crashes:
            raise CliFailure(
                f"{child.program.name} crashed {child.num_crashes} times in a row; giving up",
                remedy="its last lines say why",
                **self._last_lines(child),
            )

    def _last_lines(self, child: Child) -> dict[str, str]:
        lines = " | ".join(self._log.tail(child.program.name))
        return {child.program.name: lines} if lines else {}

    def _stop_rank(self, children: list[Child]) -> None:
        for child in children:
            child.terminate()
        for child in children:
            if not self._await_end(child):
                self._tell(f"{child.program.name} did not end in time and is killed")
            child.end()

    def _await_end(self, child: Child) -> bool:
        deadline = time.monotonic() + child.program.stop_timeout_s
        while self._num_signals < 2 and time.monotonic() < deadline:
            if child.wait(LOOK_S):
                return True
        return child.wait(0)


def describe_status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
