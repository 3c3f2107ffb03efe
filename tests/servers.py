"""Servers that tests start from PyPI packages: real ones, one a session, ended by their own pids."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

S3_BUCKET = "lorary-tests"  # one for all: SeaweedFS grows volumes for each; tests have a prefix each
S3_ADMIN = ("lorary-admin", "lorary-admin-secret")
S3_READER = ("lorary-reader", "lorary-reader-secret")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are known, so they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(holds: Callable[[], bool], *, process: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args!r} did not answer in {timeout_s} s"
        time.sleep(0.1)


class S3Server:
    """SeaweedFS with an S3 gateway over one folder. `S3_ADMIN` may do everything, `S3_READER` only read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc")
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.endpoint_url = f"http://127.0.0.1:{self._ports['s3']}"
        self._process: subprocess.Popen[bytes] | None = None
        identities = [
            _identity("admin", S3_ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", S3_READER, ["Read", "List"]),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir()

    def start(self) -> None:
        ports = self._ports
        options = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3": "true",
            "s3.autoCreateBucket": "false",
            "s3.config": self._folder / "s3.json",
            "s3.port": ports["s3"],
            "s3.port.grpc": ports["s3_grpc"],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.iam": "false",
            "master.port": ports["master"],
            "master.port.grpc": ports["master_grpc"],
            "master.volumeSizeLimitMB": 1024,
            "master.telemetry": "false",
            "volume.port": ports["volume"],
            "volume.port.grpc": ports["volume_grpc"],
            "volume.max": 30,
            "volume.minFreeSpacePercent": 0,
            "filer.port": ports["filer"],
            "filer.port.grpc": ports["filer_grpc"],
        }
        weed = Path(sys.executable).with_name("weed")
        with (self._folder / "weed.log").open("ab") as log:
            arguments = [str(weed), "server", *(f"-{name}={value}" for name, value in options.items())]
            environment = {**os.environ, "WEED_S3_SSE_KEY": "a passphrase of the tests"}
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=self._folder, env=environment)
        wait_until(self._takes_bytes, process=self._process)

    def kill(self) -> None:
        """SIGKILL: its own shutdown takes 15 s and more, and a store that goes away does not say good-bye either."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @cached_property
    def client(self) -> Any:
        """A client of the tests' own, beside the one under test."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=S3_ADMIN[0],
            aws_secret_access_key=S3_ADMIN[1],
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required", retries={"total_max_attempts": 1}),
        )

    def _takes_bytes(self) -> bool:
        """It says that it is healthy seconds before its volumes take a byte."""
        client = self.client
        try:
            with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=S3_BUCKET)
            client.put_object(Bucket=S3_BUCKET, Key="ready", Body=b"x")
        except (BotoCoreError, ClientError):
            return False
        return True


def _identity(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    folder = Path(tempfile.mkdtemp(prefix="lorary-s3-"))
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
