"""Addresses on this machine: a port to listen on, and how to reach who listens."""

from __future__ import annotations

import socket

from registry.cli.failure import CliFailure


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises CliFailure when `port` is taken: a clear sentence now instead of a child that dies over and over."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise CliFailure(
            f"cannot listen on {host}:{port}: {error.strerror}", remedy="give another --port (0 takes a free one)", field="port", value=port
        ) from error


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - compared, not bound
