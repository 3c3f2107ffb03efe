"""A version's signature: who vouches for a push, that it was so, and what it is worth today."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from registry.adapters.models import AdapterVersion, VersionSignature
from registry.artifact.gate import SIGNATURE_FILE
from registry.artifact.manifest import FileEntry
from registry.audit import service as audit
from registry.blobs.store import BlobStore
from registry.db import WriteSession
from registry.signing import service as signing
from registry.signing.models import OFF
from registry.signing.schemas import SignatureOut
from registry.signing.service import Trust, TrustedKey
from registry.tenants.auth import TenantSubject


def signer_of(trust: Trust, store: BlobStore, tenant_id: str, files: Mapping[str, FileEntry]) -> TrustedKey | None:
    """Who vouches for these files. Their digests are those that the upload was hashed to, so no byte is read again.

    Raises Invalid where the tenant's policy is not satisfied.
    """
    signature = files.get(SIGNATURE_FILE)
    data = b"".join(store.stream(tenant_id, signature.sha256)) if signature is not None and trust.policy != OFF else None
    return signing.judge(trust, {path: file.sha256 for path, file in files.items() if path != SIGNATURE_FILE}, data)


def remember(session: WriteSession, subject: TenantSubject, version_id: str, key: TrustedKey | None) -> None:
    """The latest verdict counts: the same bytes may have been pushed before while nobody asked."""
    if key is None:
        return
    signing.require_trusted(session, subject.tenant_id, key)
    known = session.get(VersionSignature, version_id)
    if known is not None and known.key_id == key.key_id:
        return
    if known is None:
        session.add(VersionSignature(version_id=version_id, tenant_id=subject.tenant_id, key_id=key.key_id))
    else:
        known.key_id = key.key_id
    session.flush()
    after = {"key": key.name, "fingerprint": key.public_key.fingerprint}
    audit.record(session, subject, "version.verified", "version", version_id, after=after, tenant_id=subject.tenant_id)


def is_distrusted(session: WriteSession, version: AdapterVersion) -> bool:
    """Where a policy still asks for signatures, and the key of this one is no longer good."""
    signature = version.signature
    if signature is None or signing.policy_of(session, version.tenant_id).effective == OFF:
        return False
    return signature.key.revoked_at is not None


def unverified(paths: Iterable[str]) -> SignatureOut:
    """Of a version with these files that nobody vouches for."""
    return SignatureOut(verdict="unchecked" if SIGNATURE_FILE in paths else "unsigned")


def describe(version: AdapterVersion) -> SignatureOut:
    found = version.signature
    if found is None:
        return unverified(file["path"] for file in version.manifest["files"])
    return SignatureOut(
        verdict="verified" if found.key.revoked_at is None else "key_revoked",
        key=found.key.name,
        fingerprint=found.key.fingerprint,
        verified_at=found.verified_at,
        key_revoked_at=found.key.revoked_at,
    )
