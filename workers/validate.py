"""The data half of the gate: hash the pushed bytes again, repeat the checks of the push, look at every weight.

A version leaves `pending` here and nowhere else, with its raw form and the `default` alias in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from registry import metrics
from registry.adapters import publication, repository
from registry.adapters.models import PENDING
from registry.artifact.base import BaseSpec
from registry.artifact.digest import StreamHasher
from registry.artifact.errors import ArtifactRefused
from registry.artifact.gate import check_push
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE, FileEntry, FormManifest, VersionManifest
from registry.artifact.scan import scan_weights
from registry.blobs import service as blobs
from registry.blobs.store import BlobMissing, BlobStore
from registry.db import Database, WriteSession
from registry.jobs.service import Claim
from workers.shell import Attempt, Publish


class BytesLost(Exception):
    """The store gave other bytes than the tenant pushed under `sha256`, or none. `detail` is for the tenant."""

    def __init__(self, code: str, detail: str, *, sha256: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.sha256 = sha256


@dataclass(frozen=True)
class PendingVersion:
    """What the job must know of its version, read once."""

    tenant_id: str
    version_id: str
    manifest: VersionManifest
    base: BaseSpec
    base_digest: str


@dataclass(frozen=True)
class Validation:
    """The job of kind `validate_version`; payload {version_id}."""

    database: Database
    store: BlobStore
    max_rank: int

    def run(self, claim: Claim, attempt: Attempt) -> Publish:
        version = self._load(claim)
        if version is None:
            return lambda _session: {"outcome": publication.GONE}
        try:
            self._judge(version, attempt)
        except ArtifactRefused as refused:
            metrics.gate_outcomes.labels("job", refused.code).inc()
            return _rejection(version, code=refused.code, detail=refused.detail)
        except BytesLost as lost:
            if claim.attempt < claim.max_attempts:
                raise  # what one reading found may be the reading's fault: the tenant hears of it when every attempt found it
            metrics.gate_outcomes.labels("job", lost.code).inc()
            return _rejection(version, code=lost.code, detail=lost.detail, lost=lost.sha256)
        metrics.gate_outcomes.labels("job", "ready").inc()
        return _acceptance(version)

    def give_up(self, session: WriteSession, tenant_id: str | None, payload: Mapping[str, Any], code: str, detail: str) -> None:
        assert tenant_id is not None, "every version belongs to a tenant"
        sentence = f"the version could not be validated ({detail}); push the same bytes again to retry"
        publication.publish_rejected(session, tenant_id, payload["version_id"], code=code, detail=sentence)

    def _load(self, claim: Claim) -> PendingVersion | None:
        assert claim.tenant_id is not None, "every version belongs to a tenant"
        with self.database.read() as session:
            version = repository.version_by_id(session, claim.tenant_id, claim.payload["version_id"])
            if version is None or version.status != PENDING:
                return None
            base = version.base_model
            assert base.spec is not None, "a version is only pushed for a ready base model"
            assert base.base_digest is not None, "a version is only pushed for a ready base model"
            manifest = VersionManifest.from_json(version.manifest)
            return PendingVersion(version.tenant_id, version.id, manifest, BaseSpec.from_json(base.spec), base.base_digest)

    def _judge(self, version: PendingVersion, attempt: Attempt) -> None:
        """Raises ArtifactRefused for what the bytes say whose digests are right, and BytesLost where they are not.

        A refusal is looked at twice: the bytes may have gone bad between the hashing and the scan, or in one reading of them.
        """
        self._hash_again(version, attempt)
        try:
            self._check(version, attempt)
        except ArtifactRefused:
            self._hash_again(version, attempt)
            self._check(version, attempt)

    def _hash_again(self, version: PendingVersion, attempt: Attempt) -> None:
        """What was hashed on upload may have been damaged since."""
        for file in version.manifest.files:
            hasher = StreamHasher()
            for chunk in self._stream(version, file):
                hasher.update(chunk)
                attempt.check()
            if hasher.digest != file.sha256:
                detail = f"the stored bytes of {file.path!r} are damaged; upload them and push again"
                raise BytesLost("blob_damaged", detail, sha256=file.sha256)

    def _stream(self, version: PendingVersion, file: FileEntry) -> Iterator[bytes]:
        try:
            return self.store.stream(version.tenant_id, file.sha256)
        except BlobMissing as error:
            detail = f"the stored bytes of {file.path!r} are gone; upload them and push again"
            raise BytesLost("blob_missing", detail, sha256=file.sha256) from error

    def _check(self, version: PendingVersion, attempt: Attempt) -> None:
        files = {file.path: file for file in version.manifest.files}
        config = b"".join(self._stream(version, files[CONFIG_FILE]))
        with self.store.open(version.tenant_id, files[WEIGHTS_FILE].sha256) as weights:
            accepted = check_push(
                {path: file.size for path, file in files.items()},
                config=config,
                weights=weights,
                weights_size=files[WEIGHTS_FILE].size,
                base=version.base,
                base_names=(),  # the push has settled which base model it is
                max_rank=self.max_rank,
            )
            attempt.check()
            scan_weights(weights, header=accepted.header)


def _acceptance(version: PendingVersion) -> Publish:
    form = FormManifest.raw(version.manifest, base_digest=version.base_digest)
    return lambda session: {"outcome": publication.publish_ready(session, version.tenant_id, version.version_id, form=form)}


def _rejection(version: PendingVersion, *, code: str, detail: str, lost: str | None = None) -> Publish:
    def publish(session: WriteSession) -> Mapping[str, Any]:
        if lost is not None:
            blobs.forget(session, version.tenant_id, lost)
        outcome = publication.publish_rejected(session, version.tenant_id, version.version_id, code=code, detail=detail)
        return {"outcome": outcome, "code": code}

    return publish
