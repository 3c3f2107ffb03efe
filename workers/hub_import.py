"""Import of an adapter from a hub: read one commit through the guarded client, keep its files, push them as the tenant.

Nothing of a hub is trusted: four file names alone are taken, each within its size; what the hub says of a file's
sha256 must be so; and the version passes the gate like any other. A hub that is away or breaks off is tried again; a
repository that will never do is refused with a sentence, which is the job's result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from registry.adapters import push, push_check
from registry.adapters import repository as adapters
from registry.adapters.push_check import CheckedPush
from registry.adapters.schemas import PushIn
from registry.artifact.digest import StreamHasher
from registry.artifact.errors import ArtifactRefused
from registry.artifact.gate import DEFAULT_LIMITS, README_FILE, SIGNATURE_FILE
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
from registry.audit import service as audit
from registry.blobs import repository as blob_rows
from registry.blobs import service as blobs
from registry.blobs.store import CHUNK_BYTES, BlobStore
from registry.config import Settings
from registry.db import Database, WriteSession
from registry.errors import Conflict, Invalid, QuotaExceeded, RateLimited, RegistryError, Unavailable
from registry.jobs import service as jobs
from registry.jobs.service import Claim, StaleFence
from registry.outbound import OutboundClient, OutboundFailed, make_outbound_client
from registry.quotas import service as quotas
from registry.quotas.schemas import Measure
from registry.quotas.service import Limits
from registry.sealing import Sealer, make_sealer
from registry.secrets import service as secrets
from registry.tenants.auth import TenantSubject
from workers.hub_source import HubCommit, HubFile, HubSource
from workers.importing import ImportRefused
from workers.progress import Progress
from workers.shell import Attempt, Publish


@dataclass(frozen=True)
class Wanted:
    """One import as its job names it."""

    subject: TenantSubject
    repo: str
    revision: str
    name: str
    base_model: str | None
    endpoint: str | None
    token_secret: str | None

    @classmethod
    def of(cls, claim: Claim) -> Wanted:
        assert claim.tenant_id is not None, "every import belongs to a tenant"
        payload = dict(claim.payload)
        subject = TenantSubject(key_id=claim.subject_id, tenant_id=claim.tenant_id, tenant=payload.pop("tenant"), scopes=frozenset())
        return cls(subject=subject, **payload)


@dataclass(frozen=True)
class Fetched:
    """Bytes that are in the store, and what config and header say of them."""

    commit: HubCommit
    pushed: PushIn
    checked: CheckedPush


@dataclass(frozen=True)
class HubImport:
    """The job of kind `import_hub`; payload {repo, revision, name, base_model, endpoint, token_secret, tenant}."""

    database: Database
    store: BlobStore
    outbound: OutboundClient
    sealer: Sealer | None
    max_rank: int
    max_bytes: int
    timeout_s: float
    limits: Limits  # of tenants without a quota of their own

    def run(self, claim: Claim, attempt: Attempt) -> Publish:
        wanted = Wanted.of(claim)
        try:
            fetched = self._fetch(wanted, claim, attempt)
        except StaleFence:
            raise
        except (ImportRefused, ArtifactRefused) as refused:
            return _refusal(refused.code, refused.detail)
        except RegistryError as refused:
            if refused.status >= 500:  # ours: the store is full or away
                raise
            return _refusal(refused.error_code, refused.detail)
        return lambda session: _publish(session, wanted, fetched, limits=self.limits)

    def give_up(self, _session: WriteSession, _tenant_id: str | None, _payload: Mapping[str, Any], _code: str, _detail: str) -> None:
        """Nothing waits for an import but its job; blobs that it stored are the garbage collector's."""

    def _fetch(self, wanted: Wanted, claim: Claim, attempt: Attempt) -> Fetched:
        source = HubSource(self.outbound, endpoint=wanted.endpoint, repo=wanted.repo, token=self._token(wanted), timeout_s=self.timeout_s)
        commit = source.commit(wanted.revision)
        files = choose(commit, max_bytes=self.max_bytes)
        self._require_room(wanted, files)
        progress = Progress(lambda values: self._tell(claim, values), total_bytes=sum(file.size for file in files))
        digests = {file.path: self._keep(wanted, source, commit, file, progress=progress, attempt=attempt) for file in files}
        pushed = PushIn(files=digests, base_model=wanted.base_model)
        checked = push_check.check(
            self.database, self.store, wanted.subject.tenant_id, pushed, max_rank=self.max_rank, defaults=self.limits
        )
        return Fetched(commit, pushed, checked)

    def _require_room(self, wanted: Wanted, files: Sequence[HubFile]) -> None:
        """Before gigabytes are copied. Files whose digest the hub does not tell are small."""
        missing = sum(file.size for file in files if file.sha256 is None or not self._has(wanted, file.sha256))
        with self.database.read() as session:
            quotas.require_room(session, wanted.subject.tenant_id, Measure.BYTES, missing, defaults=self.limits)

    def _token(self, wanted: Wanted) -> str | None:
        if wanted.token_secret is None:
            return None
        if self.sealer is None:
            raise Unavailable("this worker has no LORARY_SECRET_KEY, so it cannot open the token; another worker may", retry_after_s=30)
        with self.database.read() as session:
            return secrets.value_of(session, wanted.subject.tenant_id, wanted.token_secret, sealer=self.sealer)

    def _tell(self, claim: Claim, values: Mapping[str, Any]) -> None:
        with self.database.write() as session:
            jobs.progress(session, claim, values)

    def _keep(self, wanted: Wanted, source: HubSource, commit: HubCommit, file: HubFile, *, progress: Progress, attempt: Attempt) -> str:
        """sha256 of the file, which is then a blob of the tenant: it had it, or it is copied now."""
        progress.file = file.path
        if file.sha256 is not None and self._has(wanted, file.sha256):
            progress.advance(file.size)
            return file.sha256
        with tempfile.TemporaryFile() as spool:
            digest = _copy(source, commit, file, spool, progress=progress, attempt=attempt)
            spool.seek(0)
            self._store(wanted, spool, digest, size=file.size, attempt=attempt)
        return digest

    def _has(self, wanted: Wanted, sha256: str) -> bool:
        tenant_id = wanted.subject.tenant_id
        with self.database.read() as session:
            blob = blob_rows.get(session, tenant_id, sha256)
        return blob is not None and self.store.size(tenant_id, sha256) == blob.size

    def _store(self, wanted: Wanted, spool: BinaryIO, sha256: str, *, size: int, attempt: Attempt) -> None:
        upload = self.store.begin(wanted.subject.tenant_id, sha256, max_bytes=size)
        try:
            while chunk := spool.read(CHUNK_BYTES):
                upload.write(chunk)
                attempt.check()
            upload.commit()
        finally:
            upload.abort()
        blobs.keep_upload(self.database, self.store, wanted.subject, sha256, size=size, defaults=self.limits)


def make_hub_import(settings: Settings, database: Database, store: BlobStore) -> HubImport:
    return HubImport(
        database=database,
        store=store,
        outbound=make_outbound_client(settings),
        sealer=make_sealer(settings) if settings.secret_key.get_secret_value() else None,
        max_rank=settings.max_adapter_rank,
        max_bytes=settings.max_import_bytes,
        timeout_s=settings.import_timeout_s,
        limits=quotas.defaults_of(settings),
    )


def choose(commit: HubCommit, *, max_bytes: int) -> list[HubFile]:
    """What an adapter consists of, among whatever else lies in a repository. Raises ImportRefused."""
    limits = {
        CONFIG_FILE: DEFAULT_LIMITS.config_bytes,
        WEIGHTS_FILE: min(DEFAULT_LIMITS.weights_bytes, max_bytes),
        README_FILE: DEFAULT_LIMITS.readme_bytes,
        SIGNATURE_FILE: DEFAULT_LIMITS.signature_bytes,
    }
    found = {file.path: file for file in commit.files if file.path in limits}
    for needed in (CONFIG_FILE, WEIGHTS_FILE):
        if needed not in found:
            remedy = "pickles are not taken" if needed == WEIGHTS_FILE else "name a repository that PEFT's save_pretrained wrote"
            raise ImportRefused("hub_no_adapter", f"the repository has no {needed} at revision {commit.sha[:12]}; {remedy}")
    for kept_or_refused in (CONFIG_FILE, WEIGHTS_FILE, SIGNATURE_FILE):  # a signature that is left out looks like none
        if kept_or_refused in found and found[kept_or_refused].size > limits[kept_or_refused]:
            detail = f"{kept_or_refused} has {found[kept_or_refused].size} bytes, at most {limits[kept_or_refused]} are imported"
            raise ImportRefused("file_too_large", detail)
    return [found[path] for path, limit in limits.items() if path in found and found[path].size <= limit]


def _copy(source: HubSource, commit: HubCommit, file: HubFile, spool: BinaryIO, *, progress: Progress, attempt: Attempt) -> str:
    """sha256 of the bytes that came. Raises OutboundFailed where they are not those that the hub announced."""
    hasher = StreamHasher()
    with source.open(commit, file) as (_, chunks):
        for chunk in chunks:
            attempt.check()
            spool.write(chunk)
            hasher.update(chunk)
            progress.advance(len(chunk))
    if hasher.size != file.size or hasher.digest != (file.sha256 or hasher.digest):
        raise OutboundFailed("protocol", f"the bytes of {file.path} are not those that the hub announced")
    return hasher.digest


def _publish(session: WriteSession, wanted: Wanted, fetched: Fetched, *, limits: Limits) -> Mapping[str, Any]:
    try:
        with session.begin_nested():
            recorded = push.record(session, wanted.subject, wanted.name, fetched.pushed, fetched.checked, defaults=limits)
    except (Invalid, Conflict, QuotaExceeded, RateLimited) as refused:  # the adapter is another base model's, the quota is used up, ...
        return {"outcome": "refused", "code": refused.error_code, "detail": refused.detail}
    tenant_id = wanted.subject.tenant_id
    version = adapters.version_by_id(session, tenant_id, recorded.version_id)
    assert version is not None, "recorded in this very transaction"
    source = {"repo": wanted.repo, "endpoint": wanted.endpoint, "revision": wanted.revision, "commit": fetched.commit.sha}
    audit.record(session, wanted.subject, "version.imported", "version", version.id, after=source, tenant_id=tenant_id)
    return {"outcome": "imported", "adapter": wanted.name, "number": version.number, "validation_job_id": recorded.job_id, **source}


def _refusal(code: str, detail: str) -> Publish:
    return lambda _session: {"outcome": "refused", "code": code, "detail": detail}
