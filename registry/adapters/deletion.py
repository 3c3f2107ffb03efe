"""Deleting, restoring and purging of adapters and versions.

Deleted: it stops resolving at once, keeps its bytes, and comes back whole, with the aliases that it took along.
Purged: its forms and its hold on bytes are gone, by request or once `deleted_retention_s` is over; the row stays, so that
its number never means anything else, and only a push of the same bytes revives it.
"""

from __future__ import annotations

from registry.adapters import alias_rows, aliases, repository, signatures
from registry.adapters.models import DELETED, READY, Adapter, AdapterVersion
from registry.adapters.push import refuse_base_model_name, revive
from registry.adapters.service import adapter_not_found, get_version, lock_adapter, version_not_found
from registry.audit import service as audit
from registry.blobs import service as blobs
from registry.config import Settings
from registry.db import WriteSession, database_time
from registry.errors import Conflict
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Limits
from registry.tenants.auth import Subject, TenantSubject


def delete_adapter(session: WriteSession, subject: TenantSubject, name: str) -> None:
    """The adapter, its versions and its aliases stop resolving at once."""
    adapter = lock_adapter(session, subject.tenant_id, name)
    versions = repository.living_versions(session, subject.tenant_id, adapter.id)
    adapter.deleted_at = database_time(session)  # its versions carry the same time: that is how a restore knows them
    for version in versions:
        _mark_deleted(session, subject, adapter, version)
    aliases.remove_all(session, subject, adapter)
    numbers = sorted(version.number for version in versions)
    audit.record(session, subject, "adapter.deleted", "adapter", adapter.id, before={"name": name, "versions": numbers})


def delete_version(session: WriteSession, subject: TenantSubject, name: str, number: int) -> None:
    """The version stops resolving at once, and with it the aliases that point at it."""
    adapter = lock_adapter(session, subject.tenant_id, name)
    version = get_version(session, subject.tenant_id, adapter.name, number)
    before = {"adapter": name, "number": number, "status": version.status}
    _mark_deleted(session, subject, adapter, version)
    version.deleted_at = database_time(session)
    aliases.remove_all(session, subject, adapter, version_id=version.id)
    session.flush()
    audit.record(session, subject, "version.deleted", "version", version.id, before=before, after={"status": DELETED})


def restore_adapter(session: WriteSession, subject: TenantSubject, name: str, *, defaults: Limits) -> Adapter:
    """The adapter with the versions and aliases that its deletion took along. One that is not deleted stays as it is.

    A version whose signing key was revoked meanwhile stays deleted.

    Raises Conflict where nothing of it is left to restore or a base model has its name by now, and QuotaExceeded.
    """
    allowance = quotas.allowance(session, subject.tenant_id, Measure.ADAPTERS, defaults=defaults)
    adapter = lock_with_deleted(session, subject.tenant_id, name)
    if adapter.deleted_at is None:
        return adapter
    taken_along = repository.versions_deleted_at(session, subject.tenant_id, adapter.id, adapter.deleted_at)
    if not taken_along:
        raise _purged(f"every version of adapter {name!r} was purged", field="name", value=name)
    refuse_base_model_name(session, name)
    allowance.spend(session, Measure.ADAPTERS, 1)
    adapter.deleted_at = None
    session.flush()
    audit.record(session, subject, "adapter.restored", "adapter", adapter.id, after={"name": name}, tenant_id=subject.tenant_id)
    for version in taken_along:
        if not signatures.is_distrusted(session, version):
            _restore(session, subject, adapter, version)
    return adapter


def restore_version(session: WriteSession, subject: TenantSubject, name: str, number: int) -> tuple[AdapterVersion, str | None]:
    """The version as it was, with its aliases where nothing else has their names now; one that never was ready is checked again.

    One that is not deleted stays as it is. Raises Conflict for a purged one, and where the adapter itself is deleted.
    """
    adapter, version = _locked_version(session, subject.tenant_id, name, number)
    if version.status != DELETED:
        return version, None
    if adapter.deleted_at is not None:
        raise Conflict(
            f"adapter {name!r} is deleted with all its versions; restore the adapter",
            field="name",
            value=name,
            remedy=f"POST /api/v1/adapters/{name}/restore",
            code="adapter_deleted",
        )
    if version.purged_at is not None:
        raise _purged(f"version {number} was purged", field="number", value=number)
    if version.base_model_id != adapter.base_model_id:
        raise Conflict(
            f"version {number} is for another base model than adapter {name!r} is for by now; push its files under another name",
            field="number",
            value=number,
            remedy="push its files under another name",
            code="base_model_mismatch",
        )
    if signatures.is_distrusted(session, version):
        raise Conflict(
            f"the key that signed version {number} was revoked; sign its files with another key and push them",
            field="number",
            value=number,
            remedy="sign its files with another key and push them",
            code="signature_key_revoked",
        )
    return version, _restore(session, subject, adapter, version)


def purge_version(session: WriteSession, subject: TenantSubject, name: str, number: int, *, settings: Settings) -> AdapterVersion:
    """Give up a deleted version's bytes for good. Raises Conflict for one that is not deleted."""
    _adapter, version = _locked_version(session, subject.tenant_id, name, number)
    if version.status != DELETED:
        raise Conflict(
            f"version {number} is {version.status}; delete it before it is purged",
            field="number",
            value=number,
            remedy=f"DELETE /api/v1/adapters/{name}/versions/{number}",
            code="version_not_deleted",
        )
    purge(session, subject, version, settings=settings)
    purged = repository.version_by_id(session, subject.tenant_id, version.id)
    assert purged is not None, "rows of versions are never removed"
    return purged


def purge_deleted(session: WriteSession, subject: TenantSubject, name: str, *, settings: Settings) -> list[int]:
    """Every deleted version of an adapter, deleted itself or not; returns the numbers that were purged now."""
    adapter = lock_with_deleted(session, subject.tenant_id, name)
    versions = repository.purgeable_versions(session, subject.tenant_id, adapter.id)
    for version in versions:
        purge(session, subject, version, settings=settings)
    return [version.number for version in versions]


def purge(session: WriteSession, subject: Subject, version: AdapterVersion, *, settings: Settings) -> None:
    """Call under `lock_adapter`, for a deleted version. Again: nothing changes."""
    if version.purged_at is not None:
        return
    for form in list(version.forms):
        session.delete(form)
    version.purged_at, version.deleted_aliases = database_time(session), None
    session.flush()
    blobs.let_go(session, version.tenant_id, version.id, settings=settings)
    before = {"adapter": version.adapter.name, "number": version.number, "version_digest": version.version_digest}
    audit.record(session, subject, "version.purged", "version", version.id, before=before, tenant_id=version.tenant_id)


def lock_with_deleted(session: WriteSession, tenant_id: str, name: str) -> Adapter:
    """Raises NotFound for a name that the tenant never had."""
    found = repository.adapter(session, tenant_id, name, with_deleted=True)
    if found is None:
        raise adapter_not_found(name)
    return repository.lock_adapter(session, tenant_id, found.id)


def _locked_version(session: WriteSession, tenant_id: str, name: str, number: int) -> tuple[Adapter, AdapterVersion]:
    adapter = lock_with_deleted(session, tenant_id, name)
    version = repository.version(session, tenant_id, adapter.id, number, with_deleted=True)
    if version is None:
        raise version_not_found(name, number)
    return adapter, version


def _mark_deleted(session: WriteSession, subject: TenantSubject, adapter: Adapter, version: AdapterVersion) -> None:
    own = alias_rows.aliases(session, subject.tenant_id, adapter.id, version_id=version.id)
    version.deleted_aliases = [alias.name for alias in own] or None
    version.status, version.deleted_at = DELETED, adapter.deleted_at


def _restore(session: WriteSession, subject: TenantSubject, adapter: Adapter, version: AdapterVersion) -> str | None:
    names = version.deleted_aliases or []
    job_id = revive(session, subject, version)
    for name in names if version.status == READY else ():
        if alias_rows.alias(session, subject.tenant_id, adapter.id, name) is None:
            aliases.create(session, subject, adapter, name, version=version, moved_by=subject.key_id)
    return job_id


def _purged(what: str, *, field: str, value: object) -> Conflict:
    return Conflict(
        f"{what} and its bytes are given up; push the same bytes again", field=field, value=value, remedy="push them again", code="purged"
    )
