"""The push's second half: record a version that names blobs uploaded before, once `push_check` found nothing against it.

`record` is one write transaction that holds for two equal pushes at once: both lock the adapter, the second finds the
version of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from registry.adapters import push_rows, repository, search, signatures
from registry.adapters.models import DELETED, PENDING, READY, REJECTED, Adapter, AdapterVersion
from registry.adapters.publication import make_ready
from registry.adapters.push_check import CheckedPush
from registry.adapters.schemas import FileOut, PushIn, VersionOut
from registry.adapters.service import describe_anew
from registry.artifact.manifest import VersionManifest
from registry.audit import service as audit
from registry.base_models import repository as base_repository
from registry.blobs import service as blob_rules
from registry.blobs.store import BlobMissing
from registry.db import WriteSession
from registry.errors import Conflict, Invalid
from registry.jobs import service as jobs
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Allowance, Limits
from registry.tenants.auth import TenantSubject


@dataclass(frozen=True)
class Recorded:
    """`created`: a new number. `job_id`: the validation that was started, or None where none was needed.

    `version`: what is to be shown, where it is known without reading it back.
    """

    version_id: str
    created: bool
    job_id: str | None
    version: VersionOut | None = None


def record(session: WriteSession, subject: TenantSubject, name: str, wanted: PushIn, checked: CheckedPush, *, defaults: Limits) -> Recorded:
    """The version of these bytes: a new one, or the one that is there, revived where it was rejected or deleted.

    Raises QuotaExceeded and RateLimited under the tenant's quota, or `defaults`.
    """
    allowance = Allowance(subject.tenant_id, {})
    if checked.is_limited:
        allowance = quotas.allowance(session, subject.tenant_id, Measure.ADAPTERS, Measure.VERSIONS, defaults=defaults)
    adapter_id = _adapter(session, subject, name, wanted, checked, allowance=allowance)
    made = push_rows.add_version(
        session,
        subject.tenant_id,
        adapter_id,
        manifest=checked.manifest,
        accepted=checked.accepted,
        base_model_id=checked.base_model_id,
        created_by=subject.key_id,
    )
    if made is None:
        return _record_again(session, subject, adapter_id, checked)
    allowance.spent(session, Measure.VERSIONS, 1)
    _hold_files(session, subject.tenant_id, made.id, checked.manifest)
    after = {"adapter": name, "number": made.number, "version_digest": checked.manifest.digest}
    audit.record(session, subject, "version.created", "version", made.id, after=after, tenant_id=subject.tenant_id)
    signatures.remember(session, subject, made.id, checked.signed_by)
    job_id = _start_validation(session, subject, made.id, adapter=name)
    return Recorded(made.id, True, job_id, _shown(name, made, checked, subject) if checked.signed_by is None else None)


def _record_again(session: WriteSession, subject: TenantSubject, adapter_id: str, checked: CheckedPush) -> Recorded:
    version = repository.version_by_content(
        session, subject.tenant_id, adapter_id, version_digest=checked.manifest.digest, base_model_id=checked.base_model_id
    )
    assert version is not None, "it was in the way a moment ago, and rows are never removed"
    signatures.remember(session, subject, version.id, checked.signed_by)
    return Recorded(version.id, False, revive(session, subject, version))


def _shown(name: str, made: push_rows.NewVersion, checked: CheckedPush, subject: TenantSubject) -> VersionOut:
    """As `service.describe_version` would show it."""
    files = [FileOut(**file.to_json()) for file in checked.manifest.files]
    return VersionOut(
        adapter=name,
        number=made.number,
        version_digest=checked.manifest.digest,
        status="pending",
        reason=None,
        base_model=checked.base_model,
        rank=checked.accepted.rank,
        targets=list(checked.accepted.targets),
        num_params=checked.accepted.num_params,
        size_bytes=checked.manifest.size_bytes,
        files=files,
        forms=[],
        signature=signatures.unverified(file.path for file in files),
        created_at=made.created_at,
        created_by=subject.key_id,
        deleted_at=None,
        restorable_until=None,
        purged_at=None,
    )


def refuse_base_model_name(session: WriteSession, name: str) -> None:
    if base_repository.by_name(session, name) is not None:
        raise _name_taken(name)


def _name_taken(name: str) -> Conflict:
    return Conflict(
        f"{name!r} is a base model, and a request for that name could mean either; choose another name",
        field="name",
        value=name,
        remedy="choose a name that no base model has",
        code="name_taken",
    )


def _require_base_model(*, exists: bool, checked: CheckedPush) -> None:
    """It was there when bytes were read, in an earlier transaction."""
    if not exists:
        raise Conflict(f"base model {checked.base_model!r} was deleted a moment ago", field="base_model", value=checked.base_model)


def _adapter(
    session: WriteSession, subject: TenantSubject, name: str, wanted: PushIn, checked: CheckedPush, *, allowance: Allowance
) -> str:
    """The id of the adapter, locked: created, restored or as it is."""
    found = push_rows.lock_adapter(session, subject.tenant_id, name, base_model_id=checked.base_model_id)
    if found is None:
        made = _create(session, subject, name, wanted, checked, allowance=allowance)
        return made or _adapter(session, subject, name, wanted, checked, allowance=allowance)
    if found.is_base_model:
        raise _name_taken(name)
    _require_base_model(exists=found.base_model_exists, checked=checked)
    if found.deleted_at is not None:
        _restore(session, subject, found.id, checked, allowance=allowance)
    elif found.base_model_id != checked.base_model_id:
        raise Invalid(
            f"adapter {name!r} is for another base model than {checked.base_model!r}; push under another name",
            field="base_model",
            value=checked.base_model,
            remedy="choose another adapter name",
            code="base_model_mismatch",
        )
    if described := wanted.model_dump(include={"description", "tags"}, exclude_none=True):
        describe_anew(session, subject, repository.lock_adapter(session, subject.tenant_id, found.id), described)
    return found.id


def _create(
    session: WriteSession, subject: TenantSubject, name: str, wanted: PushIn, checked: CheckedPush, *, allowance: Allowance
) -> str | None:
    """None where another push made it a moment ago."""
    refuse_base_model_name(session, name)
    _require_base_model(exists=base_repository.get(session, checked.base_model_id) is not None, checked=checked)
    allowance.spend(session, Measure.ADAPTERS, 1)
    described = {"description": wanted.description or "", "tags": wanted.tags or []}
    adapter = Adapter(id=uuid4().hex, tenant_id=subject.tenant_id, name=name, base_model_id=checked.base_model_id, **described)
    if not push_rows.add_adapter(session, adapter):
        return None
    search.index(session, adapter)
    _audit(session, subject, "adapter.created", adapter)
    return adapter.id


def _restore(session: WriteSession, subject: TenantSubject, adapter_id: str, checked: CheckedPush, *, allowance: Allowance) -> None:
    allowance.spend(session, Measure.ADAPTERS, 1)
    adapter = repository.lock_adapter(session, subject.tenant_id, adapter_id)
    adapter.deleted_at, adapter.base_model_id = None, checked.base_model_id
    session.flush()
    _audit(session, subject, "adapter.restored", adapter)


def revive(session: WriteSession, subject: TenantSubject, version: AdapterVersion) -> str | None:
    """Identical bytes again: ready stays, deleted is restored, rejected is validated again, pending keeps its job.

    Returns the id of the validation that decides about it, where one does.
    """
    before = version.status
    if before in {DELETED, REJECTED}:
        _hold_files(session, version.tenant_id, version.id, VersionManifest.from_json(version.manifest))
        version.deleted_at = version.purged_at = version.deleted_aliases = None
    if before == DELETED and version.forms:
        make_ready(session, subject, version, after={"restored": True})
        return None
    if before in {DELETED, REJECTED}:
        version.status, version.reason = PENDING, None
        session.flush()
        audit.record(
            session,
            subject,
            "version.revalidated",
            "version",
            version.id,
            before={"status": before},
            after={"status": PENDING},
            tenant_id=subject.tenant_id,
        )
        return _start_validation(session, subject, version.id, adapter=version.adapter.name)
    if before == READY:
        return None
    # pending: a job that was cancelled or lost must not leave it so for ever
    live = repository.live_validation(session, subject.tenant_id, version.id)
    return live.id if live else _start_validation(session, subject, version.id, adapter=version.adapter.name)


def _hold_files(session: WriteSession, tenant_id: str, version_id: str, manifest: VersionManifest) -> None:
    """From here on the GC leaves its bytes alone. Raises Invalid where it took them since they were read."""
    try:
        blob_rules.hold(session, tenant_id, version_id, {file.sha256 for file in manifest.files})
    except BlobMissing as missing:
        raise Invalid(missing.detail, field="files", value=missing.value, remedy=missing.remedy, code=missing.error_code) from missing


def _start_validation(session: WriteSession, subject: TenantSubject, version_id: str, *, adapter: str) -> str:
    return jobs.submit(
        session,
        kind=jobs.VALIDATE_VERSION,
        tenant_id=subject.tenant_id,
        subject_id=subject.key_id,
        adapter=adapter,
        payload={"version_id": version_id},
    )


def _audit(session: WriteSession, subject: TenantSubject, action: str, adapter: Adapter) -> None:
    after = {"name": adapter.name, "base_model_id": adapter.base_model_id, "description": adapter.description, "tags": adapter.tags}
    audit.record(session, subject, action, "adapter", adapter.id, after=after, tenant_id=subject.tenant_id)
