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
from pydantic import SecretStr
from sqlalchemy import text

import migrations
from registry.audit.service import record
from registry.config import FirstKeys, Settings, load_settings
from registry.db import WriteSession, open_database
from registry.roles import ensure_roles
from registry.tenants import repository, service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import ADMIN, REPLICA, KeyHasher, NewKey, given_key

log = structlog.get_logger(__name__)

_FIRST_KEY_LOCK = 0x6C6F7262


@dataclass(frozen=True)
class InitResult:
    """`settings` carry the secret key. `admin_token` is the first admin key, told once; None when keys exist already or it was given."""

    settings: Settings
    admin_token: str | None


def init_database(settings: Settings, *, keys: FirstKeys | None = None) -> InitResult:
    """Make what is missing of secret key, PostgreSQL accounts, schema and first keys. A schema of a later release stays as it is.

    Raises ValueError when LORARY_SECRET_KEY is given but too short, the accounts are not three, or a given key is none.
    """
    keys = keys or FirstKeys(first_admin_key=SecretStr(""), replica_key=SecretStr(""))
    admin = _given("LORARY_FIRST_ADMIN_KEY", keys.first_admin_key)
    replica = _given("LORARY_REPLICA_KEY", keys.replica_key)
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _one_at_a_time(settings.state_dir / "init.lock"):
        settings = ensure_secret_key(settings)
        hasher = KeyHasher(settings.secret_key.get_secret_value())
        ensure_roles(settings)
        _upgrade(settings.resolved_owner_url)
        database = open_database(settings)
        try:
            with database.system_write() as session:
                token = _first_admin_key(session, hasher, given=admin)
                _ensure_replica_key(session, hasher, given=replica)
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


def _given(variable: str, token: SecretStr) -> NewKey | None:
    text = token.get_secret_value().strip()
    try:
        return given_key(text) if text else None
    except ValueError as error:
        raise ValueError(f"{variable} is {error}; make one with `lorary keys generate`") from None


def _upgrade(url: str) -> None:
    """After a rollback of the program the schema is ahead of it, which it can serve and cannot take back."""
    revision = migrations.revision_of(url)
    if migrations.is_newer(revision):
        log.info("schema.newer", revision=revision, head=migrations.head_revision())
        return
    migrations.upgrade(url)


def _first_admin_key(session: WriteSession, hasher: KeyHasher, *, given: NewKey | None) -> str | None:
    """Keys come only from keys, so "no key at all" means that this installation never had one. A given token is not told again."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _FIRST_KEY_LOCK})
    if repository.any_key(session):
        return None
    token = _store(session, hasher, name="first admin key", scope=ADMIN, given=given)
    return None if given else token


def _ensure_replica_key(session: WriteSession, hasher: KeyHasher, *, given: NewKey | None) -> None:
    """A known id is left alone: a revoked key does not come back."""
    if given is None or repository.find_key(session, None, given.key_id) is not None:
        return
    _store(session, hasher, name="replica key of db init", scope=REPLICA, given=given)


def _store(session: WriteSession, hasher: KeyHasher, *, name: str, scope: str, given: NewKey | None) -> str:
    _key, token = service.issue_key(
        session, subject=SYSTEM, tenant_id=None, name=name, scopes={scope}, expires_at=None, hasher=hasher, record=record, given=given
    )
    return token


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """SQLite cannot wait for another migrator by itself; the operating system drops the lock with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
