"""Rules of tenants and API keys.

Audit lies above tenants (an event names its subject), so the recorder is handed in by the composition root.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

from registry.db import ReadSession, WriteSession, database_time
from registry.errors import Conflict, Invalid, NotFound
from registry.pagination import encode_cursor
from registry.tenants import repository
from registry.tenants.auth import Subject
from registry.tenants.keys import KeyHasher, NewKey, new_key
from registry.tenants.models import ApiKey, Tenant
from registry.tenants.rights import check_grantable, check_prefixes, check_scopes, expiry_of, may_manage

RESERVED_NAMES = frozenset({"api", "v1", "models", "datasets", "docs", "metrics"})
BATCH = 200


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


def get_tenant(session: ReadSession, name: str, *, with_deleted: bool = False) -> Tenant:
    tenant = repository.tenant_by_name(session, name, include_deleted=with_deleted)
    if tenant is None:
        raise NotFound(f"tenant {name!r} does not exist", field="name", value=name, remedy="see `GET /api/v1/tenants`")
    return tenant


def tenant_name(session: ReadSession, tenant_id: str | None) -> str | None:
    tenant = None if tenant_id is None else session.get(Tenant, tenant_id)
    return None if tenant is None else tenant.name


def delete_tenant(session: WriteSession, *, subject: Subject, name: str, record: Recorder) -> None:
    """Soft: the row stays, and every key of the tenant stops with this transaction."""
    tenant = get_tenant(session, name)
    tenant.deleted_at = database_time(session)
    record(session, subject, "tenant.deleted", "tenant", tenant.id, before={"name": name}, tenant_id=tenant.id)


def restore_tenant(session: WriteSession, *, subject: Subject, name: str, record: Recorder) -> Tenant:
    """Its keys work again. One that is not deleted stays as it is. Raises Conflict once a purge was asked for."""
    tenant = get_tenant(session, name, with_deleted=True)
    if tenant.purge_requested_at is not None:
        raise Conflict(
            f"tenant {name!r} is being purged and cannot come back", field="name", value=name, remedy="create another", code="purged"
        )
    if tenant.deleted_at is not None:
        tenant.deleted_at = None
        record(session, subject, "tenant.restored", "tenant", tenant.id, after={"name": name}, tenant_id=tenant.id)
    return tenant


def request_purge(session: WriteSession, *, subject: Subject, name: str, record: Recorder) -> Tenant:
    """The GC gives up what a deleted tenant holds, without waiting for the retention time. Raises Conflict for a living one."""
    tenant = get_tenant(session, name, with_deleted=True)
    if tenant.deleted_at is None:
        raise Conflict(
            f"tenant {name!r} is not deleted; delete it before it is purged",
            field="name",
            value=name,
            remedy=f"DELETE /api/v1/tenants/{name}",
            code="tenant_not_deleted",
        )
    if tenant.purge_requested_at is None:
        tenant.purge_requested_at = database_time(session)
        record(session, subject, "tenant.purge_requested", "tenant", tenant.id, after={"name": name}, tenant_id=tenant.id)
    return tenant


def create_key(
    session: WriteSession,
    *,
    subject: Subject,
    name: str,
    scopes: Collection[str],
    expires_in_s: int | None,
    hasher: KeyHasher,
    record: Recorder,
    adapter_prefixes: Collection[str] | None = None,
) -> tuple[ApiKey, str]:
    """The stored key and its token, which nobody can read again.

    Raises Invalid for scopes that are unknown or do not fit the key's owner, Forbidden for more than the subject has.
    """
    check_scopes(scopes, in_tenant=subject.tenant_id is not None)
    check_grantable(subject, scopes)
    check_prefixes(subject, adapter_prefixes, scopes=scopes)
    return issue_key(
        session,
        subject=subject,
        tenant_id=subject.tenant_id,
        name=name,
        scopes=scopes,
        adapter_prefixes=adapter_prefixes,
        expires_at=expiry_of(session, subject, expires_in_s),
        hasher=hasher,
        record=record,
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
    adapter_prefixes: Collection[str] | None = None,
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
        adapter_prefixes=None if adapter_prefixes is None else sorted(set(adapter_prefixes)),
        created_by=subject.key_id,
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    record(session, subject, "key.created", "key", key.id, after=described(key), tenant_id=tenant_id)
    return key, made.token


def get_key(session: ReadSession, subject: Subject, key_id: str) -> ApiKey:
    """Raises NotFound, the same for an absent key, another tenant's and one beyond a limited subject's adapters."""
    key = repository.find_key(session, subject.tenant_id, key_id)
    if key is None or not may_manage(subject, key):
        raise NotFound(f"key {key_id!r} does not exist", field="id", value=key_id, remedy="see `GET /api/v1/keys`")
    return key


def list_keys(session: ReadSession, subject: Subject, *, limit: int, cursor: str | None) -> Sequence[tuple[ApiKey, str | None]]:
    """With their tenants' names, one more than `limit`. A limited subject's listing skips what it may not manage."""
    if subject.adapter_prefixes is None:
        return repository.list_keys(session, subject.tenant_id, limit=limit, cursor=cursor)
    found: list[tuple[ApiKey, str | None]] = []
    while len(found) <= limit:
        rows = repository.list_keys(session, subject.tenant_id, limit=BATCH, cursor=cursor)
        found += [row for row in rows[:BATCH] if may_manage(subject, row[0])]
        if len(rows) <= BATCH:
            break
        last = rows[BATCH - 1][0]
        cursor = encode_cursor(last.created_at, last.id)
    return found[: limit + 1]


def revoke_key(session: WriteSession, *, subject: Subject, key_id: str, record: Recorder) -> None:
    """Idempotent. The key stops with this transaction. NotFound for another tenant's key too."""
    key = get_key(session, subject, key_id)
    if key.revoked_at is not None:
        return
    key.revoked_at = database_time(session)
    record(session, subject, "key.revoked", "key", key.id, before=described(key), after={"revoked": True}, tenant_id=key.tenant_id)


def described(key: ApiKey) -> dict[str, Any]:
    """A key as the audit log tells of it."""
    expires_at = key.expires_at.isoformat() if key.expires_at else None
    return {"name": key.name, "scopes": key.scopes, "adapter_prefixes": key.adapter_prefixes, "expires_at": expires_at}
