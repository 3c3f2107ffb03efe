"""What both registries hold when they are measured, and what is asked of them: the same names, versions and aliases."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx2
import psutil

OPERATIONS = ("create version", "alias move", "resolve", "list")
VERSIONS = 2
PAGE = 100
START_S = 180.0


@dataclass(frozen=True)
class World:
    """`adapters` named `adapter-00000` on, each with two ready versions and the aliases `default` and `prod`."""

    adapters: int
    clients: int
    workers: int

    def names(self, client: int) -> Iterator[str]:
        """A client's own share of the adapters, round and round: clients meet at the server, not at one row."""
        return itertools.cycle(f"adapter-{number:05d}" for number in range(client, self.adapters, self.clients))


class Side(Protocol):
    """One of the two registries, running."""

    name: str
    port: int
    statuses: Mapping[str, int]
    process: subprocess.Popen[bytes]

    def requests(self, operation: str, *, client: int) -> Iterator[bytes]: ...


def start(command: Sequence[str], *, environment: dict[str, str], log: Path, url: str) -> subprocess.Popen[bytes]:
    """A server as a process group of its own, once it answers at `url`."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return process
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    stop(process)
    raise RuntimeError(f"{command[0]} did not answer: {log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Processor time of a server and everything below it, so far."""
    total = 0.0
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:
        try:
            total += sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def base_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("LORARY_", "MLFLOW_"))}


PYTHON = sys.executable
