"""What becomes of a pushed version: ready with its raw form, or rejected. Called by the validation job, under its fence."""

from __future__ import annotations

from typing import Any

from registry.adapters import alias_rows, aliases, repository, signatures
from registry.adapters.models import PENDING, READY, REJECTED, AdapterVersion, Form
from registry.adapters.service import DEFAULT_ALIAS
from registry.artifact.manifest import FormManifest
from registry.audit import service as audit
from registry.blobs import service as blobs
from registry.blobs.store import BlobMissing
from registry.db import WriteSession
from registry.tenants.auth import SYSTEM, Subject

GONE = "gone"


def publish_ready(session: WriteSession, tenant_id: str, version_id: str, *, form: FormManifest) -> str:
    """pending -> ready with its raw form, and the `default` alias where this is the first ready version.

    Returns the outcome: `gone` where the version is no longer pending (deleted, or another job was faster), `rejected`
    where its blobs were taken back meanwhile.
    """
    version = _pending_version(session, tenant_id, version_id)
    if version is None:
        return GONE
    if signatures.is_distrusted(session, version):
        detail = "the key that signed it was revoked while it was checked; sign it with another key and push again"
        return publish_rejected(session, tenant_id, version_id, code="signature_key_revoked", detail=detail)
    try:
        blobs.hold(session, tenant_id, version.id, {blob.sha256 for blob in form.blobs.values()})
    except BlobMissing as missing:
        return publish_rejected(session, tenant_id, version_id, code=missing.error_code, detail=missing.detail)
    session.add(
        Form(
            tenant_id=tenant_id,
            version_id=version.id,
            kind=form.kind,
            form_digest=form.digest,
            manifest=form.to_json(),
            size_bytes=form.size_bytes,
        )
    )
    make_ready(session, SYSTEM, version, after={"form_digest": form.digest})
    return READY


def publish_rejected(session: WriteSession, tenant_id: str, version_id: str, *, code: str, detail: str) -> str:
    """pending -> rejected with the reason."""
    version = _pending_version(session, tenant_id, version_id)
    if version is None:
        return GONE
    reason = {"code": code, "detail": detail}
    version.status, version.reason = REJECTED, reason
    session.flush()
    _audit(session, SYSTEM, "version.rejected", version, before=PENDING, after={"status": REJECTED, "reason": reason})
    return REJECTED


def make_ready(session: WriteSession, subject: Subject, version: AdapterVersion, *, after: dict[str, Any]) -> None:
    """Call under `lock_adapter`, with the version's form in place.

    `default` is set by the first ready version only; where it was removed by hand beside a ready version it stays away.
    """
    before, tenant_id = version.status, version.tenant_id
    version.status, version.reason = READY, None
    session.flush()
    _audit(session, subject, "version.ready", version, before=before, after={"status": READY, **after})
    first = not repository.has_other_ready_version(session, tenant_id, version.adapter_id, than=version.id)
    if first and alias_rows.alias(session, tenant_id, version.adapter_id, DEFAULT_ALIAS) is None:
        aliases.create(session, subject, version.adapter, DEFAULT_ALIAS, version=version, moved_by=version.created_by)


def _pending_version(session: WriteSession, tenant_id: str, version_id: str) -> AdapterVersion | None:
    version = repository.version_by_id(session, tenant_id, version_id)
    if version is None:
        return None
    repository.lock_adapter(session, tenant_id, version.adapter_id)
    version = repository.version_by_id(session, tenant_id, version_id)
    return version if version is not None and version.status == PENDING else None


def _audit(session: WriteSession, subject: Subject, action: str, version: AdapterVersion, *, before: str, after: dict[str, Any]) -> None:
    after = {"adapter": version.adapter.name, "number": version.number, "version_digest": version.version_digest, **after}
    audit.record(session, subject, action, "version", version.id, before={"status": before}, after=after, tenant_id=version.tenant_id)
