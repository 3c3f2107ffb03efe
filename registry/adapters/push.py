"""The push: check what config and header alone can tell, then record a version that names blobs uploaded before.

`check` opens short read transactions around the reading of bytes; `record` is one write transaction that holds for
two equal pushes at once: both lock the adapter, the second finds the version of the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError

from registry import metrics
from registry.adapters import repository, search, signatures
from registry.adapters.models import DELETED, PENDING, READY, REJECTED, Adapter, AdapterVersion
from registry.adapters.publication import make_ready
from registry.adapters.schemas import PushIn
from registry.adapters.service import describe_anew
from registry.artifact.base import BaseSpec
from registry.artifact.errors import ArtifactRefused
from registry.artifact.gate import Accepted, check_files, check_push
from registry.artifact.lora import parse_config
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE, FileEntry, VersionManifest, require_safe_path
from registry.audit import service as audit
from registry.base_models import repository as base_repository
from registry.base_models import service as base_models
from registry.base_models.models import BaseModelRevision
from registry.blobs import repository as blobs
from registry.blobs import service as blob_rules
from registry.blobs.store import BlobMissing, BlobStore
from registry.db import Database, ReadSession, WriteSession
from registry.errors import Conflict, Invalid
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Allowance, Limits
from registry.signing.service import TrustedKey
from registry.tenants.auth import TenantSubject


@dataclass(frozen=True)
class CheckedPush:
    """A push that config, header and signature do not refuse. `signed_by` vouches for it, where the policy asks."""

    manifest: VersionManifest
    base_model_id: str
    base_model: str
    accepted: Accepted
    signed_by: TrustedKey | None


@dataclass(frozen=True)
class Recorded:
    """`created`: a new number. `job`: the validation that was started, or None where none was needed."""

    version_id: str
    created: bool
    job: Job | None


def check(database: Database, store: BlobStore, tenant_id: str, wanted: PushIn, *, max_rank: int) -> CheckedPush:
    """Raises Invalid with the gate's code where blobs are absent or config and header are refused."""
    try:
        return _check(database, store, tenant_id, wanted, max_rank=max_rank)
    except ArtifactRefused as refused:
        metrics.gate_outcomes.labels("push", refused.code).inc()
        metrics.pushes.labels("refused").inc()
        raise Invalid(refused.detail, field=refused.field, value=refused.value, remedy=refused.remedy, code=refused.code) from refused
    except BlobMissing as missing:  # a disk lost what a row promises
        raise Invalid(missing.detail, field="files", value=missing.value, remedy=missing.remedy, code=missing.error_code) from missing


def _check(database: Database, store: BlobStore, tenant_id: str, wanted: PushIn, *, max_rank: int) -> CheckedPush:
    with database.read() as session:
        manifest = _manifest(session, tenant_id, wanted)
    files = {file.path: file for file in manifest.files}
    check_files({path: file.size for path, file in files.items()})
    signed_by = signatures.signer_of(database, store, tenant_id, files)
    config = b"".join(store.stream(tenant_id, files[CONFIG_FILE].sha256))
    upstream = parse_config(config).base_model_name
    with database.read() as session:
        base = base_models.choose(session, named=wanted.base_model, upstream=upstream)
        base_names = _accepted_names(session, base, wanted, upstream=upstream)
    assert base.spec is not None, "a ready base model has its spec"
    with store.open(tenant_id, files[WEIGHTS_FILE].sha256) as weights:
        accepted = check_push(
            {path: file.size for path, file in files.items()},
            config=config,
            weights=weights,
            weights_size=files[WEIGHTS_FILE].size,
            base=BaseSpec.from_json(base.spec),
            base_names=base_names,
            max_rank=max_rank,
        )
    return CheckedPush(manifest, base.id, base.name, accepted, signed_by)


def record(session: WriteSession, subject: TenantSubject, name: str, wanted: PushIn, checked: CheckedPush, *, defaults: Limits) -> Recorded:
    """The version of these bytes: a new one, or the one that is there, revived where it was rejected or deleted.

    Raises QuotaExceeded and RateLimited under the tenant's quota, or `defaults`.
    """
    allowance = quotas.allowance(session, subject.tenant_id, Measure.ADAPTERS, Measure.VERSIONS, defaults=defaults)
    refuse_base_model_name(session, name)
    _require_base_model(session, checked)
    adapter = _adapter(session, subject, name, wanted, checked, allowance=allowance)
    version = repository.version_by_content(
        session, subject.tenant_id, adapter.id, version_digest=checked.manifest.digest, base_model_id=checked.base_model_id
    )
    if version is None:
        allowance.spend(session, Measure.VERSIONS, 1)
        version = _add_version(session, subject, adapter, checked)
        signatures.remember(session, subject, version, checked.signed_by)
        return Recorded(version.id, True, _start_validation(session, subject, version, adapter=adapter))
    signatures.remember(session, subject, version, checked.signed_by)
    return Recorded(version.id, False, revive(session, subject, version, adapter=adapter))


def _manifest(session: ReadSession, tenant_id: str, wanted: PushIn) -> VersionManifest:
    for path in wanted.files:
        require_safe_path(path)  # before any message repeats it
    sizes = blobs.sizes(session, tenant_id, set(wanted.files.values()))
    for path, sha256 in sorted(wanted.files.items()):
        if sha256 not in sizes:
            raise Invalid(
                f"files[{path!r}] names blob {sha256}, which was not uploaded; upload it, then push again",
                field="files",
                value=sha256,
                remedy=f"PUT /api/v1/blobs/{sha256}",
                code="blob_missing",
            )
    return VersionManifest(files=tuple(FileEntry(path, sha256, sizes[sha256]) for path, sha256 in wanted.files.items()))


def _accepted_names(session: ReadSession, base: BaseModelRevision, wanted: PushIn, *, upstream: str | None) -> frozenset[str]:
    """What `base_model_name_or_path` may say; empty: anything.

    A tenant who names the base model vouches for it, because training scripts write local paths there. But a path that
    is another registered model's name contradicts the request.
    """
    if wanted.base_model is None:
        return base_models.names_of(base)
    others = (other for other in base_repository.everyone(session) if other.id != base.id)
    contradicted = any(upstream in base_models.names_of(other) for other in others)
    return base_models.names_of(base) if contradicted else frozenset()


def refuse_base_model_name(session: WriteSession, name: str) -> None:
    if base_repository.by_name(session, name) is not None:
        raise Conflict(
            f"{name!r} is a base model, and a request for that name could mean either; choose another name",
            field="name",
            value=name,
            remedy="choose a name that no base model has",
            code="name_taken",
        )


def _require_base_model(session: WriteSession, checked: CheckedPush) -> None:
    """It was there when bytes were read, in an earlier transaction."""
    if base_repository.get(session, checked.base_model_id) is None:
        raise Conflict(f"base model {checked.base_model!r} was deleted a moment ago", field="base_model", value=checked.base_model)


def _adapter(
    session: WriteSession, subject: TenantSubject, name: str, wanted: PushIn, checked: CheckedPush, *, allowance: Allowance
) -> Adapter:
    """The adapter, locked: created, restored or as it is."""
    found = repository.adapter(session, subject.tenant_id, name, with_deleted=True)
    if found is None:
        allowance.spend(session, Measure.ADAPTERS, 1)
        found = _create(session, subject, name, wanted, checked)
    adapter = repository.lock_adapter(session, subject.tenant_id, found.id)
    if adapter.deleted_at is not None:
        allowance.spend(session, Measure.ADAPTERS, 1)
        adapter.deleted_at, adapter.base_model_id = None, checked.base_model_id
        _audit(session, subject, "adapter.restored", adapter)
    if adapter.base_model_id != checked.base_model_id:
        raise Invalid(
            f"adapter {name!r} is for another base model than {checked.base_model!r}; push under another name",
            field="base_model",
            value=checked.base_model,
            remedy="choose another adapter name",
            code="base_model_mismatch",
        )
    describe_anew(session, subject, adapter, wanted.model_dump(include={"description", "tags"}, exclude_none=True))
    return adapter


def _create(session: WriteSession, subject: TenantSubject, name: str, wanted: PushIn, checked: CheckedPush) -> Adapter:
    described = {"description": wanted.description or "", "tags": wanted.tags or []}
    adapter = Adapter(tenant_id=subject.tenant_id, name=name, base_model_id=checked.base_model_id, **described)
    try:
        with session.begin_nested():
            session.add(adapter)
    except IntegrityError:
        other = repository.adapter(session, subject.tenant_id, name, with_deleted=True)
        assert other is not None, "the name was taken a moment ago and rows are never removed"
        return other
    search.index(session, adapter)
    _audit(session, subject, "adapter.created", adapter)
    return adapter


def _add_version(session: WriteSession, subject: TenantSubject, adapter: Adapter, checked: CheckedPush) -> AdapterVersion:
    accepted = checked.accepted
    version = AdapterVersion(
        tenant_id=subject.tenant_id,
        adapter_id=adapter.id,
        number=repository.next_number(session, subject.tenant_id, adapter.id),
        version_digest=checked.manifest.digest,
        status=PENDING,
        base_model_id=checked.base_model_id,
        manifest=checked.manifest.to_json(),
        rank=accepted.rank,
        targets=list(accepted.targets),
        num_params=accepted.num_params,
        size_bytes=checked.manifest.size_bytes,
        created_by=subject.key_id,
    )
    session.add(version)
    session.flush()
    _hold_files(session, version)
    after = {"adapter": adapter.name, "number": version.number, "version_digest": version.version_digest}
    audit.record(session, subject, "version.created", "version", version.id, after=after, tenant_id=subject.tenant_id)
    return version


def revive(session: WriteSession, subject: TenantSubject, version: AdapterVersion, *, adapter: Adapter) -> Job | None:
    """Identical bytes again: ready stays, deleted is restored, rejected is validated again, pending keeps its job."""
    before = version.status
    if before in {DELETED, REJECTED}:
        _hold_files(session, version)
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
        return _start_validation(session, subject, version, adapter=adapter)
    if before == READY:
        return None
    # pending: a job that was cancelled or lost must not leave it so for ever
    live = repository.live_validation(session, subject.tenant_id, version.id)
    return live or _start_validation(session, subject, version, adapter=adapter)


def _hold_files(session: WriteSession, version: AdapterVersion) -> None:
    """From here on the GC leaves its bytes alone. Raises Invalid where it took them since they were read."""
    try:
        blob_rules.hold(session, version.tenant_id, version.id, [file["sha256"] for file in version.manifest["files"]])
    except BlobMissing as missing:
        raise Invalid(missing.detail, field="files", value=missing.value, remedy=missing.remedy, code=missing.error_code) from missing


def _start_validation(session: WriteSession, subject: TenantSubject, version: AdapterVersion, *, adapter: Adapter) -> Job:
    return jobs.enqueue(
        session,
        kind=jobs.VALIDATE_VERSION,
        tenant_id=subject.tenant_id,
        subject_id=subject.key_id,
        adapter=adapter.name,
        payload={"version_id": version.id},
    )


def _audit(session: WriteSession, subject: TenantSubject, action: str, adapter: Adapter) -> None:
    after = {"name": adapter.name, "base_model_id": adapter.base_model_id, "description": adapter.description, "tags": adapter.tags}
    audit.record(session, subject, action, "adapter", adapter.id, after=after, tenant_id=subject.tenant_id)
