"""Making an installation: secret key, accounts, schema, first admin key. `lorary db init` and `lorary up` call it.

Idempotent, and safe against a crash between any two steps and against two callers at once.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import text

import migrations
from registry.audit.service import record
from registry.config import Settings, load_settings
from registry.db import WriteSession, open_database
from registry.roles import ensure_roles
from registry.tenants import repository, service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import ADMIN, KeyHasher

log = structlog.get_logger(__name__)

_FIRST_KEY_LOCK = 0x6C6F7262


@dataclass(frozen=True)
class InitResult:
    """`settings` carry the secret key. `admin_token` is the first admin key, told once; None when keys exist already."""

    settings: Settings
    admin_token: str | None


def init_database(settings: Settings) -> InitResult:
    """Make what is missing of secret key, PostgreSQL accounts, schema and first admin key.

    Raises ValueError when LORARY_SECRET_KEY is given but too short, or the accounts are not three.
    """
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _one_at_a_time(settings.state_dir / "init.lock"):
        settings = ensure_secret_key(settings)
        hasher = KeyHasher(settings.secret_key.get_secret_value())
        ensure_roles(settings)
        migrations.upgrade(settings.resolved_owner_url)
        database = open_database(settings)
        try:
            with database.system_write() as session:
                token = _first_admin_key(session, hasher)
        finally:
            database.close()
    return InitResult(settings=settings, admin_token=token)


def ensure_secret_key(settings: Settings) -> Settings:
    """Settings with a secret key: the given one, the file's, or a new one in `<state_dir>/secret.key` (mode 0600)."""
    if settings.secret_key.get_secret_value():
        return settings
    if not settings.secret_key_file.exists():
        _write_once(settings.secret_key_file, secrets.token_urlsafe(48) + "\n")
        log.info("secret_key.created", path=str(settings.secret_key_file))
    return load_settings(**settings.model_dump(exclude={"secret_key"}))


def _write_once(path: Path, content: str) -> None:
    """All of the file or none of it, and never over an existing one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _first_admin_key(session: WriteSession, hasher: KeyHasher) -> str | None:
    """Keys come only from keys, so "no key at all" means that this installation never had one."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _FIRST_KEY_LOCK})
    if repository.any_key(session):
        return None
    _key, token = service.issue_key(
        session, subject=SYSTEM, tenant_id=None, name="first admin key", scopes={ADMIN}, expires_at=None, hasher=hasher, record=record
    )
    return token


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """SQLite cannot wait for another migrator by itself; the operating system drops the lock with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
