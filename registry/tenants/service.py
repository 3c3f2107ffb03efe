"""Rules of tenants and API keys.

Audit lies above tenants (an event names its subject), so the recorder is handed in by the composition root.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from typing import Any, Protocol
from uuid import uuid4

from registry.db import ReadSession, WriteSession, database_time
from registry.errors import Conflict, Forbidden, Invalid, NotFound
from registry.tenants import repository
from registry.tenants.auth import Subject
from registry.tenants.keys import ADMIN, PLATFORM_SCOPES, SCOPES, TENANT_SCOPES, KeyHasher, NewKey, new_key
from registry.tenants.models import ApiKey, Tenant

RESERVED_NAMES = frozenset({"api", "v1", "models", "datasets", "docs", "metrics"})


class Recorder(Protocol):
    """`registry.audit.service.record`."""

    def __call__(
        self,
        session: WriteSession,
        subject: Subject,
        action: str,
        resource_type: str,
        resource_id: str,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        tenant_id: str | None = None,
    ) -> object: ...


def create_tenant(session: WriteSession, *, subject: Subject, name: str, record: Recorder) -> Tenant:
    if name in RESERVED_NAMES:
        raise Invalid(f"tenant name {name!r} is reserved", field="name", value=name, remedy="choose another name")
    if repository.tenant_by_name(session, name, include_deleted=True) is not None:
        raise Conflict(
            f"a tenant named {name!r} exists or existed",
            field="name",
            value=name,
            remedy="choose another name: names of deleted tenants are not given away",
        )
    tenant = Tenant(id=uuid4().hex, name=name)
    session.add(tenant)
    session.flush()
    record(session, subject, "tenant.created", "tenant", tenant.id, after={"name": name}, tenant_id=tenant.id)
    return tenant


def get_tenant(session: ReadSession, name: str) -> Tenant:
    tenant = repository.tenant_by_name(session, name)
    if tenant is None:
        raise NotFound(f"tenant {name!r} does not exist", field="name", value=name, remedy="see `GET /api/v1/tenants`")
    return tenant


def delete_tenant(session: WriteSession, *, subject: Subject, name: str, record: Recorder) -> None:
    """Soft: the row stays, and every key of the tenant stops with this transaction."""
    tenant = get_tenant(session, name)
    tenant.deleted_at = database_time(session)
    record(session, subject, "tenant.deleted", "tenant", tenant.id, before={"name": name}, tenant_id=tenant.id)


def create_key(
    session: WriteSession,
    *,
    subject: Subject,
    name: str,
    scopes: Collection[str],
    expires_in_s: int | None,
    hasher: KeyHasher,
    record: Recorder,
) -> tuple[ApiKey, str]:
    """The stored key and its token, which nobody can read again.

    Raises Invalid for scopes that are unknown or do not fit the key's owner, Forbidden for more than the subject has.
    """
    _check_scopes(scopes, in_tenant=subject.tenant_id is not None)
    _check_grantable(subject, scopes)
    expires_at = _expiry(session, subject, expires_in_s)
    return issue_key(
        session, subject=subject, tenant_id=subject.tenant_id, name=name, scopes=scopes, expires_at=expires_at, hasher=hasher, record=record
    )


def issue_key(
    session: WriteSession,
    *,
    subject: Subject,
    tenant_id: str | None,
    name: str,
    scopes: Collection[str],
    expires_at: dt.datetime | None,
    hasher: KeyHasher,
    record: Recorder,
    given: NewKey | None = None,
) -> tuple[ApiKey, str]:
    """Store a key whose rights somebody else has checked: a new one, or the given one."""
    made = given or new_key()
    key = ApiKey(
        id=made.key_id,
        tenant_id=tenant_id,
        name=name,
        token_hmac=hasher.digest(made.token),
        scopes=sorted(set(scopes)),
        created_by=subject.key_id,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    record(session, subject, "key.created", "key", key.id, after=_described(key), tenant_id=tenant_id)
    return key, made.token


def revoke_key(session: WriteSession, *, subject: Subject, key_id: str, record: Recorder) -> None:
    """Idempotent. The key stops with this transaction. NotFound for another tenant's key too."""
    key = repository.find_key(session, subject.tenant_id, key_id)
    if key is None:
        raise NotFound(f"key {key_id!r} does not exist", field="id", value=key_id, remedy="see `GET /api/v1/keys`")
    if key.revoked_at is not None:
        return
    key.revoked_at = database_time(session)
    record(session, subject, "key.revoked", "key", key.id, before=_described(key), tenant_id=key.tenant_id)


def _check_scopes(scopes: Collection[str], *, in_tenant: bool) -> None:
    unknown = sorted(set(scopes) - SCOPES)
    if unknown:
        raise Invalid(
            f"scope {unknown[0]!r} does not exist", field="scopes", value=unknown[0], remedy=f"choose among {', '.join(sorted(SCOPES))}"
        )
    if in_tenant and (wrong := sorted(PLATFORM_SCOPES & set(scopes))):
        raise Invalid(
            f"scope {wrong[0]!r} belongs to no tenant",
            field="scopes",
            value=wrong[0],
            remedy="create this key with an admin key and without naming a tenant",
        )
    if not in_tenant and (wrong := sorted(TENANT_SCOPES & set(scopes))):
        raise Invalid(
            f"scope {wrong[0]!r} needs a tenant", field="scopes", value=wrong[0], remedy="name the tenant in the header X-Lorary-Tenant"
        )


def _check_grantable(subject: Subject, scopes: Collection[str]) -> None:
    """An admin may hand out `replica` without having it; nobody else may hand out what they lack."""
    missing = sorted(scope for scope in scopes if not (subject.has(scope) or ADMIN in subject.scopes))
    if missing:
        raise Forbidden(
            f"this key cannot grant {missing[0]}, which it lacks", field="scopes", value=missing[0], remedy=f"leave {missing[0]} out"
        )


def _expiry(session: ReadSession, subject: Subject, expires_in_s: int | None) -> dt.datetime | None:
    wanted = None if expires_in_s is None else database_time(session) + dt.timedelta(seconds=expires_in_s)
    if subject.expires_at is not None and (wanted is None or wanted > subject.expires_at):
        raise Forbidden(
            f"this key expires at {subject.expires_at.isoformat()} and cannot make one that outlives it",
            field="expires_in_s",
            value=expires_in_s,
            remedy="ask for an earlier expiry",
        )
    return wanted


def _described(key: ApiKey) -> dict[str, Any]:
    return {"name": key.name, "scopes": key.scopes, "expires_at": key.expires_at.isoformat() if key.expires_at else None}
