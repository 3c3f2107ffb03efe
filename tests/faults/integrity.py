"""What must hold of a tenant once everything has recovered, whatever was killed on the way."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import select, update

from registry.adapters.models import PENDING, READY, Adapter, AdapterVersion, Alias, AliasMove, Form
from registry.audit.models import AuditEvent
from registry.blobs.models import Blob
from registry.db import ReadSession, Table
from registry.jobs.models import FINAL, RUNNING, STATE, Job, JobEvent, OutboxMessage
from registry.uploads.models import FINALISING, LargeUpload
from registry.webhooks.models import PENDING as UNDELIVERED
from registry.webhooks.models import WebhookDelivery, WebhookEvent
from tests.faults.plant import Plant, until
from tests.servers import S3_BUCKET

T = TypeVar("T", bound=Table)


def settle(plant: Plant, tenant_id: str) -> None:
    """Until nothing of the tenant is under way. What dead workers and relays hold for up to a minute is let go now."""
    with plant.database.system_write() as session:
        session.execute(update(OutboxMessage).values(taken_until=None))
        session.execute(update(WebhookDelivery).values(lease_expires_at=None))
    until(lambda: not _under_way(plant, tenant_id), what=lambda: f"still under way: {_under_way(plant, tenant_id)}")


def _under_way(plant: Plant, tenant_id: str) -> list[tuple[Any, ...]]:
    with plant.database.system_read() as session:
        jobs = select(Job.kind, Job.state, Job.attempt, Job.error).where(Job.tenant_id == tenant_id, Job.state.not_in(FINAL))
        hints = select(OutboxMessage.job_id, OutboxMessage.taken_until).where(OutboxMessage.tenant_id == tenant_id)
        deliveries = select(WebhookDelivery.id, WebhookDelivery.lease_expires_at, WebhookDelivery.log).where(
            WebhookDelivery.tenant_id == tenant_id, WebhookDelivery.state == UNDELIVERED
        )
        return [tuple(row) for statement in (jobs, hints, deliveries) for row in session.execute(statement)]


def check_integrity(plant: Plant, tenant_id: str) -> None:
    """Raises AssertionError that names the row. Call after `settle`."""
    with plant.database.system_read() as session:
        trail = Counter(_all(session, AuditEvent.action, tenant_id))
        blobs = {blob.sha256: blob for blob in _rows(session, Blob, tenant_id)}
        _check_jobs(session, tenant_id)
        _check_versions(session, tenant_id, trail, blobs)
        _check_aliases(session, tenant_id)
        _check_uploads(session, tenant_id, trail, blobs)
        _check_webhooks(session, plant, tenant_id)
    assert trail["blob.created"] - trail["blob.forgotten"] - trail["blob.swept"] == len(blobs), "blobs and their audit events"
    for sha256, blob in blobs.items():
        body = plant.place.server.client.get_object(Bucket=S3_BUCKET, Key=f"{plant.place.prefix}/{tenant_id}/{sha256}")["Body"].read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (blob.size, sha256), "a row promises other bytes"


def _rows(session: ReadSession, table: type[T], tenant_id: str) -> Sequence[T]:
    return session.scalars(select(table).where(table.__table__.c.tenant_id == tenant_id)).all()


def _all(session: ReadSession, column: Any, tenant_id: str) -> Sequence[Any]:
    return session.scalars(select(column).where(AuditEvent.tenant_id == tenant_id, AuditEvent.outcome == "done")).all()


def _check_jobs(session: ReadSession, tenant_id: str) -> None:
    for job in _rows(session, Job, tenant_id):
        statement = select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.number)
        events = session.scalars(statement).all()
        states = [event.state for event in events if event.type == STATE]
        assert [event.number for event in events] == list(range(1, job.num_events + 1)), f"a gap in the events of {job.id}"
        assert job.state in FINAL, f"{job.id} is stuck: {job.state}"
        assert (job.lease_owner, job.lease_expires_at) == (None, None)
        assert [state for state in states if state in FINAL] == [states[-1]] == [job.state], f"{job.id} ended twice: {states}"
        assert job.fence == states.count(RUNNING), f"{job.id} ran without a claim: {states}"


def _check_versions(session: ReadSession, tenant_id: str, trail: Counter[str], blobs: dict[str, Blob]) -> None:
    adapters, versions = _rows(session, Adapter, tenant_id), _rows(session, AdapterVersion, tenant_id)
    forms = Counter(form.version_id for form in _rows(session, Form, tenant_id))
    assert trail["adapter.created"] == len(adapters), "adapters and their audit events"
    assert trail["version.created"] == len(versions), "versions and their audit events"
    for adapter in adapters:
        numbers = sorted(version.number for version in versions if version.adapter_id == adapter.id)
        assert numbers == list(range(1, len(numbers) + 1)), f"numbers of {adapter.name}: {numbers}"
    for version in versions:
        assert version.status != PENDING, f"version {version.number} was never decided"
        assert forms[version.id] == 1 if version.status == READY else forms[version.id] <= 1, "forms of a version"
        if version.status == READY:
            missing = [file["path"] for file in version.manifest["files"] if file["sha256"] not in blobs]
            assert not missing, f"a ready version without its bytes: {missing}"


def _check_aliases(session: ReadSession, tenant_id: str) -> None:
    moves: dict[tuple[str, str], list[AliasMove]] = {}
    for move in sorted(_rows(session, AliasMove, tenant_id), key=lambda move: move.generation):
        moves.setdefault((move.adapter_id, move.name), []).append(move)
    versions = {version.id: version for version in _rows(session, AdapterVersion, tenant_id)}
    for history in moves.values():
        assert [move.generation for move in history] == list(range(1, len(history) + 1)), "a gap in an alias's history"
    aliases = {(alias.adapter_id, alias.name): alias for alias in _rows(session, Alias, tenant_id)}
    for key, alias in aliases.items():
        last = moves[key][-1]
        assert (alias.generation, versions[alias.version_id].number) == (last.generation, last.number), (
            f"alias {alias.name} is not where it was moved"
        )
        assert versions[alias.version_id].status == READY, f"alias {alias.name} leads to a version that is not ready"
    gone = [key for key, history in moves.items() if key not in aliases and history[-1].number is not None]
    assert not gone, f"aliases without a row: {gone}"


def _check_uploads(session: ReadSession, tenant_id: str, trail: Counter[str], blobs: dict[str, Blob]) -> None:
    uploads = _rows(session, LargeUpload, tenant_id)
    states = Counter(upload.state for upload in uploads)
    assert states[FINALISING] == 0, "an upload that is finalised for ever"
    assert trail["upload.begun"] == len(uploads)
    assert trail["upload.done"] == states["done"]
    assert all(upload.sha256 in blobs for upload in uploads if upload.state == "done"), "an upload is done and its blob absent"


def _check_webhooks(session: ReadSession, plant: Plant, tenant_id: str) -> None:
    events = {event.id for event in _rows(session, WebhookEvent, tenant_id)}
    deliveries = _rows(session, WebhookDelivery, tenant_id)
    assert sorted(delivery.event_id for delivery in deliveries) == sorted(events), "one delivery of each event to the one endpoint"
    assert {delivery.state for delivery in deliveries} <= {"delivered"}, "a delivery failed"
    assert set(plant.ears.heard[f"/{tenant_id}"]) == events, "the receiver heard of other events than happened"
