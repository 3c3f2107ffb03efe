"""Can this process do its work? Part by part, with the reason where it cannot. Shared by the registry and its workers.

A part that is away makes the process `unavailable`, unless the work goes on without it: then it is `degraded`, which is
still ready. Draining beats everything: whoever sends requests must stop before the process does.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

import migrations
from registry.blobs.store import BlobStore
from registry.config import Settings
from registry.db import Database, utc_now
from registry.errors import RegistryError

Status = Literal["ok", "degraded", "unavailable"]

GOOD_FOR_S = 5.0
BAD_FOR_S = 1.0  # so that probes which queued behind a slow failure share it
BROKER_TIMEOUT_S = 2.0
BROKER_PORTS = {"redis": 6379, "rediss": 6379, "amqp": 5672, "amqps": 5671}


@dataclass(frozen=True)
class Finding:
    """What was found of one part: `ok`, or a sentence. `usable`: the work goes on all the same."""

    said: str = "ok"
    usable: bool = True


Check = Callable[[], Finding]


@dataclass(frozen=True)
class Report:
    """`checks` says `ok` or what is wrong, one line a part."""

    status: Status
    checks: dict[str, str]

    @property
    def is_ready(self) -> bool:
        return self.status != "unavailable"


class Readiness:
    """Asks each check anew, every time. `drain` is for ever."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = dict(checks)
        self._draining = threading.Event()

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self._checks, "admitting")

    def drain(self) -> None:
        """From now on not ready. Safe in a signal handler."""
        self._draining.set()

    def report(self) -> Report:
        found = {name: check() for name, check in self._checks.items()}
        if self._draining.is_set():
            found["admitting"] = Finding("this process is shutting down", usable=False)
        good = all(one.said == "ok" for one in found.values())
        usable = all(one.usable for one in found.values())
        status: Status = "ok" if good else "degraded" if usable else "unavailable"
        return Report(status, {name: one.said for name, one in found.items()})


class Remembered:
    """A check that costs something: a good answer holds for a few seconds, a bad one hardly. One asks at a time."""

    def __init__(self, check: Check, *, good_for_s: float = GOOD_FOR_S) -> None:
        self._check = check
        self._good_for_s = good_for_s
        self._lock = threading.Lock()
        self._found = Finding()
        self._until = float("-inf")

    def __call__(self) -> Finding:
        with self._lock:
            if time.monotonic() >= self._until:
                self._found = self._check()
                self._until = time.monotonic() + (self._good_for_s if self._found.said == "ok" else BAD_FOR_S)
            return self._found


def make_readiness(settings: Settings, database: Database, store: BlobStore) -> Readiness:
    """Database, schema, blob store, and the broker where there is one."""
    checks: dict[str, Check] = {
        "database": lambda: check_database(database),
        "schema": lambda: check_schema(database),
        "blob_store": Remembered(lambda: check_blob_store(store)),
    }
    if settings.has_broker:
        checks["broker"] = Remembered(lambda: check_broker(settings.broker_url.get_secret_value()))
    return Readiness(checks)


def check_database(database: Database) -> Finding:
    """Every role's connection answers."""
    try:
        for session in (database.read, database.system_read):
            with session() as opened:
                opened.scalar(select(utc_now()))
    except SQLAlchemyError as error:
        return Finding(f"does not answer ({type(error).__name__})", usable=False)
    return Finding()


def check_schema(database: Database) -> Finding:
    """At this program's revision. One that a later release made is usable: releases only add (migrations/README.md, rule 2)."""
    try:
        with database.read() as session:
            current = migrations.current_revision(session.connection())
    except SQLAlchemyError:
        return Finding("unknown", usable=False)
    head = migrations.head_revision()
    if current == head:
        return Finding()
    if migrations.is_newer(current):
        return Finding(f"at {current}, which is later than this program's {head}: a later release is being rolled out")
    return Finding(f"at {current}, this program needs {head}: run `lorary db upgrade`", usable=False)


def check_blob_store(store: BlobStore) -> Finding:
    try:
        store.check_writable()
    except (OSError, RegistryError) as error:
        return Finding(f"not writable: {error}", usable=False)
    return Finding()


def check_broker(url: str) -> Finding:
    """Whether something that speaks the broker's protocol answers. Jobs are polled without it: slower, not lost."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or BROKER_PORTS[parts.scheme]
    greeting = b"PING\r\n" if parts.scheme.startswith("redis") else b"AMQP\x00\x00\x09\x01"
    try:
        with socket.create_connection((host, port), timeout=BROKER_TIMEOUT_S) as plain:
            speaks = _hears(_secured(plain, host) if parts.scheme in {"rediss", "amqps"} else plain, greeting)
    except OSError as error:
        return Finding(f"{host}:{port} does not answer ({error}); jobs are found by polling")
    return Finding() if speaks else Finding(f"{host}:{port} closes the connection; jobs are found by polling")


def _secured(plain: socket.socket, host: str) -> socket.socket:
    """Encrypted, and nothing more: whether to believe the certificate is for those who send it something."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(plain, server_hostname=host)


def _hears(connection: socket.socket, greeting: bytes) -> bool:
    connection.sendall(greeting)
    return bool(connection.recv(16))
