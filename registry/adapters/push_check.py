"""The push's first half: what config, header and signature alone can refuse, before anything is written.

The database is read in one transaction, and bytes after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from registry import metrics
from registry.adapters import push_rows, signatures
from registry.adapters.schemas import PushIn
from registry.artifact.base import BaseSpec
from registry.artifact.errors import ArtifactRefused
from registry.artifact.gate import Accepted, check_files, check_push
from registry.artifact.lora import parse_config
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE, FileEntry, VersionManifest, require_safe_path
from registry.base_models import repository as base_repository
from registry.base_models import service as base_models
from registry.base_models.models import BaseModelRevision
from registry.blobs.store import BlobMissing, BlobStore
from registry.db import Database, ReadSession
from registry.errors import Invalid
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Limits
from registry.signing import service as signing
from registry.signing.models import OFF
from registry.signing.service import Trust, TrustedKey


@dataclass(frozen=True)
class CheckedPush:
    """A push that config, header and signature do not refuse. `signed_by` vouches for it, where the policy asks.

    `is_limited`: the tenant has a quota of adapters or versions, which `record` holds it to.
    """

    manifest: VersionManifest
    base_model_id: str
    base_model: str
    accepted: Accepted
    signed_by: TrustedKey | None
    is_limited: bool


@dataclass(frozen=True)
class _Known:
    """What a push is checked by, as one transaction found it before any byte was read."""

    manifest: VersionManifest
    trust: Trust
    base_models: Sequence[BaseModelRevision]
    is_limited: bool


def check(database: Database, store: BlobStore, tenant_id: str, wanted: PushIn, *, max_rank: int, defaults: Limits) -> CheckedPush:
    """Raises Invalid with the gate's code where blobs are absent or config and header are refused."""
    try:
        with database.read() as session:
            known = _look_up(session, tenant_id, wanted, defaults=defaults)
        return _check(store, tenant_id, wanted, known, max_rank=max_rank)
    except ArtifactRefused as refused:
        metrics.gate_outcomes.labels("push", refused.code).inc()
        metrics.pushes.labels("refused").inc()
        raise Invalid(refused.detail, field=refused.field, value=refused.value, remedy=refused.remedy, code=refused.code) from refused
    except BlobMissing as missing:  # a disk lost what a row promises
        raise Invalid(missing.detail, field="files", value=missing.value, remedy=missing.remedy, code=missing.error_code) from missing


def _look_up(session: ReadSession, tenant_id: str, wanted: PushIn, *, defaults: Limits) -> _Known:
    for path in wanted.files:
        require_safe_path(path)  # before any message repeats it
    rows = push_rows.uploaded(session, tenant_id, set(wanted.files.values()))
    manifest = _manifest({row.sha256: row.size for row in rows}, wanted)
    own = rows[0]  # every row has what is the tenant's
    trust = signing.trust_under(session, tenant_id, effective=signing.stricter(own.policy or OFF, own.floor or OFF))
    limits = (quotas.effective(getattr(own, what), defaults[what]) for what in (Measure.ADAPTERS, Measure.VERSIONS))
    return _Known(manifest, trust, base_repository.everyone(session), is_limited=any(limit is not None for limit in limits))


def _check(store: BlobStore, tenant_id: str, wanted: PushIn, known: _Known, *, max_rank: int) -> CheckedPush:
    files = {file.path: file for file in known.manifest.files}
    check_files({path: file.size for path, file in files.items()})
    signed_by = signatures.signer_of(known.trust, store, tenant_id, files)
    config = b"".join(store.stream(tenant_id, files[CONFIG_FILE].sha256))
    upstream = parse_config(config).base_model_name
    base = base_models.choose(known.base_models, named=wanted.base_model, upstream=upstream)
    assert base.spec is not None, "a ready base model has its spec"
    with store.open(tenant_id, files[WEIGHTS_FILE].sha256) as weights:
        accepted = check_push(
            {path: file.size for path, file in files.items()},
            config=config,
            weights=weights,
            weights_size=files[WEIGHTS_FILE].size,
            base=BaseSpec.from_json(base.spec),
            base_names=_accepted_names(known.base_models, base, wanted, upstream=upstream),
            max_rank=max_rank,
        )
    return CheckedPush(known.manifest, base.id, base.name, accepted, signed_by, known.is_limited)


def _manifest(sizes: Mapping[str, int], wanted: PushIn) -> VersionManifest:
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


def _accepted_names(known: Sequence[BaseModelRevision], base: BaseModelRevision, wanted: PushIn, *, upstream: str | None) -> frozenset[str]:
    """What `base_model_name_or_path` may say; empty: anything.

    A tenant who names the base model vouches for it, because training scripts write local paths there. But a path that
    is another registered model's name contradicts the request.
    """
    if wanted.base_model is None:
        return base_models.names_of(base)
    contradicted = any(upstream in base_models.names_of(other) for other in known if other.id != base.id)
    return base_models.names_of(base) if contradicted else frozenset()
