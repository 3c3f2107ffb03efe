"""The accounts of PostgreSQL that the application and its system parts log in with. `lorary db init` makes them.

Three roles: the owner makes tables; `lorary_app` is held to one tenant a transaction by row-level security;
`lorary_system` crosses tenants. Privileges and policies stand in migrations and name the last two; the user of a URL
either is that role or becomes a member of it.
"""

from __future__ import annotations

import psycopg
import structlog
from psycopg import sql
from sqlalchemy import URL, make_url

from registry.config import Settings

log = structlog.get_logger(__name__)

APP_ROLE, SYSTEM_ROLE = "lorary_app", "lorary_system"
_LOCK_ID = 0x6C6F7263


def ensure_roles(settings: Settings) -> None:
    """Make both accounts with their URLs' passwords where there are URLs for them. Idempotent; nothing on SQLite.

    Raises ValueError where the URLs do not name three different users, or the application's could pass by the policies.
    """
    if not settings.database_owner_url:
        return
    urls = {APP_ROLE: make_url(settings.database_url), SYSTEM_ROLE: make_url(settings.database_system_url or settings.database_url)}
    owner = make_url(settings.database_owner_url)
    _refuse_shared_users(owner, urls)
    with psycopg.connect(_conninfo(owner), connect_timeout=10) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK_ID,))
        for role, url in urls.items():
            _ensure_account(connection, role, url)
            log.info("role.ensured", role=role, account=url.username)


def _refuse_shared_users(owner: URL, urls: dict[str, URL]) -> None:
    users = [owner.username, *(url.username for url in urls.values())]
    if None in users or len(set(users)) != len(users):
        raise ValueError(
            "LORARY_DATABASE_URL, LORARY_DATABASE_SYSTEM_URL and LORARY_DATABASE_OWNER_URL must name three different users, "
            f"not {', '.join(map(str, users))}; give each its own, such as lorary_app, lorary_system and lorary_owner"
        )


def _ensure_account(connection: psycopg.Connection[tuple[object, ...]], role: str, url: URL) -> None:
    account = url.username
    assert account is not None, "checked before"
    for name in dict.fromkeys((role, account)):
        if _attributes(connection, name) is None:
            connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)))
    if account != role:
        connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(role), sql.Identifier(account)))
    _refuse_bypass(connection, account)
    if not _can_log_in(url):
        _set_password(connection, account, url.password)


def _attributes(connection: psycopg.Connection[tuple[object, ...]], name: str) -> tuple[object, ...] | None:
    return connection.execute("SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = %s", (name,)).fetchone()


def _refuse_bypass(connection: psycopg.Connection[tuple[object, ...]], account: str) -> None:
    if (_attributes(connection, account) or (False,))[0]:
        raise ValueError(
            f"PostgreSQL user {account!r} is a superuser or has BYPASSRLS, so row-level security would not hold it; "
            "give LORARY_DATABASE_URL and LORARY_DATABASE_SYSTEM_URL users without either"
        )


def _can_log_in(url: URL) -> bool:
    """Then nothing is changed, so that operators may manage the accounts themselves."""
    try:
        psycopg.connect(_conninfo(url), connect_timeout=10).close()
    except psycopg.OperationalError:
        return False
    return True


def _set_password(connection: psycopg.Connection[tuple[object, ...]], account: str, password: object) -> None:
    """As a SCRAM verifier, made here: the server's log never holds the password."""
    statement = sql.SQL("ALTER ROLE {} LOGIN").format(sql.Identifier(account))
    if password is not None:
        verifier = connection.pgconn.encrypt_password(str(password).encode(), account.encode(), b"scram-sha-256")
        statement += sql.SQL(" PASSWORD {}").format(sql.Literal(verifier.decode()))
    connection.execute(statement)


def _conninfo(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)
