"""`lorary api`, `worker`, `runtime`: this process becomes the part, so that a service manager sees the part itself.

They are started as programs, never imported: the command stays free of torch, and no arrow runs back up (DESIGN 1).
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from registry.config import child_environment

HostOption = Annotated[str | None, typer.Option("--host", help="Address to listen on. Else LORARY_HOST.")]
PortOption = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port to listen on. Else LORARY_PORT.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Processes behind one socket. Else LORARY_API_WORKERS, or 1.")]

BrokerOption = Annotated[
    str | None, typer.Option("--broker", help="redis:// or amqp:// URL. Else LORARY_BROKER_URL, where a password belongs; none: poll.")
]
QueuesOption = Annotated[str | None, typer.Option("--queues", help="Queues to serve, as in cpu,gpu. Else LORARY_WORKER_QUEUES.")]


def api(host: HostOption = None, port: PortOption = None, workers: WorkersOption = None) -> None:
    """Run the registry's HTTP server in this process, or in several below it."""
    given = {"LORARY_HOST": host, "LORARY_PORT": port, "LORARY_API_WORKERS": workers}
    _become("registry", environment={name: str(value) for name, value in given.items() if value is not None})


def worker(broker: BrokerOption = None, queues: QueuesOption = None) -> None:
    """Run the worker, which does the registry's jobs, in this process."""
    given = {"LORARY_BROKER_URL": broker, "LORARY_WORKER_QUEUES": queues}
    _become("workers", environment={name: value for name, value in given.items() if value is not None})


def runtime(
    arguments: Annotated[list[str] | None, typer.Argument(help="Flags of `python -m gpu_runtime`, after --.")] = None,
) -> None:
    """Run one replica in this process: `lorary runtime -- --model-dir DIR --registry-url URL --replica-key-file FILE`."""
    _become("gpu_runtime", *(arguments or []), environment={})


def _become(module: str, *arguments: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", module, *arguments]
    os.execve(command[0], command, child_environment(**environment))  # noqa: S606 - no shell is wanted
