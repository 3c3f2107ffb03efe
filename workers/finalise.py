"""The job of kind `finalise_upload`: hash what came in parts, place it at its address, record the blob.

It is a job and not part of the request because gigabytes take longer than a request should, and because a worker that
dies in the middle is followed by another one: the store can finalise again from any point.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.blobs import repository as blobs
from registry.blobs.store import BlobStore
from registry.db import Database, WriteSession
from registry.errors import Invalid
from registry.jobs.service import Claim
from registry.uploads import repository, service
from registry.uploads.models import FINALISING
from workers.shell import LOOK_S, Attempt, Publish


@dataclass(frozen=True)
class UploadFinaliser:
    """Payload {upload_id}."""

    database: Database
    store: BlobStore

    def run(self, claim: Claim, attempt: Attempt) -> Publish:
        tenant_id, upload_id = _tenant(claim.tenant_id), claim.payload["upload_id"]
        with self.database.read() as session:
            upload = repository.get(session, tenant_id, upload_id)
        if upload is None or upload.state != FINALISING:
            return lambda _session: {"outcome": "gone"}
        self._wait_for_collector(tenant_id, upload.sha256, attempt)
        try:
            self.store.finalise(upload.parted, sha256=upload.sha256, check=attempt.check)
        except Invalid as refused:
            code, detail = refused.error_code, refused.detail
            return lambda session: {"outcome": service.publish_rejected(session, tenant_id, upload_id, code=code, detail=detail)}
        return lambda session: {"outcome": service.publish_done(session, tenant_id, upload_id)}

    def _wait_for_collector(self, tenant_id: str, sha256: str, attempt: Attempt) -> None:
        """Bytes that lay there as garbage may be on their way out. Once they are gone this upload keeps its address safe."""
        while True:
            with self.database.read() as session:
                if not blobs.is_being_removed(session, tenant_id, sha256):
                    return
            time.sleep(LOOK_S)
            attempt.check()

    def give_up(self, session: WriteSession, tenant_id: str | None, payload: Mapping[str, Any], code: str, detail: str) -> None:
        sentence = f"the upload could not be finalised ({detail}); begin it again"
        service.publish_rejected(session, _tenant(tenant_id), payload["upload_id"], code=code, detail=sentence)


def _tenant(tenant_id: str | None) -> str:
    assert tenant_id is not None, "every upload belongs to a tenant"
    return tenant_id
