"""Rules of base models: register -> a job imports it -> ready, or failed with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import IntegrityError

from registry.artifact.errors import printable
from registry.audit import service as audit
from registry.base_models import repository
from registry.base_models.hub_source import HubLocation, check_source
from registry.base_models.models import FAILED, PENDING, READY, BaseModelRevision
from registry.base_models.schemas import BaseModelIn
from registry.config import Settings
from registry.db import ReadSession, WriteSession
from registry.errors import Conflict, Invalid, NotFound
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.tenants.auth import SYSTEM, Subject

RESOURCE = "base_model"


@dataclass(frozen=True)
class Imported:
    """What an import found out. `location` is the directory that replicas serve from, `spec` is `BaseSpec.to_json()`."""

    base_digest: str
    location: str
    spec: dict[str, Any]


def register(session: WriteSession, subject: Subject, wanted: BaseModelIn, *, settings: Settings) -> tuple[BaseModelRevision, Job | None]:
    """Record the model and the job that imports it. Raises Invalid for a hub or a secret that may not be used.

    The same registration again changes nothing, unless it failed: then it is tried again, with what is asked for now.
    """
    check_source(session, subject, wanted.source, settings=settings)
    revision = repository.by_name(session, wanted.name)
    if revision is None:
        return _create(session, subject, wanted)
    if revision.status != FAILED:
        _refuse_change(revision, wanted)
        return revision, _import_under_way(session, subject, revision)
    before = shown(revision)
    revision.status, revision.reason = PENDING, None
    revision.source, revision.upstream_names = wanted.source.given(), _upstream_names(wanted)
    return revision, _start_import(session, subject, revision, action="base_model.retried", before=before)


def get(session: ReadSession, name: str) -> BaseModelRevision:
    """Raises NotFound."""
    revision = repository.by_name(session, name)
    if revision is None:
        raise NotFound(f"there is no base model named {name!r}", field="name", value=name, remedy="GET /api/v1/base-models")
    return revision


def publish_ready(session: WriteSession, base_model_id: str, found: Imported) -> str:
    """Make a pending base model ready, or failed where another one has the same bytes. Returns the new status."""
    revision = repository.get(session, base_model_id)
    if revision is None or revision.status != PENDING:
        return "gone"
    twin = repository.by_digest(session, found.base_digest)
    if twin is not None:
        return publish_failed(
            session,
            base_model_id,
            code="duplicate_base_model",
            detail=f"base model {twin.name!r} has the same digest {found.base_digest}; use it, and give it the upstream names you need",
        )
    revision.status, revision.base_digest = READY, found.base_digest
    revision.location, revision.spec = found.location, found.spec
    session.flush()
    audit.record(session, SYSTEM, "base_model.ready", RESOURCE, revision.id, before={"status": PENDING}, after=shown(revision))
    return READY


def publish_failed(session: WriteSession, base_model_id: str, *, code: str, detail: str) -> str:
    revision = repository.get(session, base_model_id)
    if revision is None or revision.status != PENDING:
        return "gone"
    revision.status, revision.reason = FAILED, {"code": code, "detail": detail}
    session.flush()
    audit.record(session, SYSTEM, "base_model.failed", RESOURCE, revision.id, before={"status": PENDING}, after=shown(revision))
    return FAILED


def delete(session: WriteSession, subject: Subject, name: str) -> None:
    """Raises Conflict while any adapter, also a deleted one that could be restored, refers to it."""
    revision = get(session, name)
    before = shown(revision)
    try:
        with session.begin_nested():
            session.delete(revision)
    except IntegrityError as error:
        raise Conflict(
            f"base model {name!r} has adapters or replicas, and deleted adapters count because they can be restored",
            field="name",
            value=name,
            remedy="keep the base model while anything refers to it",
            code="base_model_in_use",
        ) from error
    audit.record(session, subject, "base_model.deleted", RESOURCE, revision.id, before=before)


def choose(known: Sequence[BaseModelRevision], *, named: str | None, upstream: str | None) -> BaseModelRevision:
    """The ready base model of a push, of all that there are: by its own name, or by the one name in the adapter's config.

    Raises Invalid where no or more than one model answers, Conflict where it is not ready.
    """
    if named is not None:
        matches = [revision for revision in known if revision.name == named]
    else:
        matches = [revision for revision in known if upstream in names_of(revision)]
    if len(matches) != 1:
        raise _no_choice(named=named, upstream=upstream, matches=matches)
    if matches[0].status != READY:
        raise Conflict(
            f"base model {matches[0].name!r} is {matches[0].status}, not ready; push again when it is",
            field="base_model",
            value=matches[0].name,
            remedy=f"GET /api/v1/base-models/{matches[0].name}",
            code="base_model_not_ready",
        )
    return matches[0]


def names_of(revision: BaseModelRevision) -> frozenset[str]:
    """Every name under which an adapter's config may mean this model."""
    return frozenset((revision.name, *revision.upstream_names))


def shown(revision: BaseModelRevision) -> dict[str, Any]:
    """The state that the audit log keeps."""
    return {
        "name": revision.name,
        "status": revision.status,
        "reason": revision.reason,
        "base_digest": revision.base_digest,
        "source": revision.source,
        "upstream_names": revision.upstream_names,
    }


def _create(session: WriteSession, subject: Subject, wanted: BaseModelIn) -> tuple[BaseModelRevision, Job]:
    if repository.adapter_has_name(session, wanted.name):
        raise Conflict(
            f"an adapter is named {wanted.name!r}, and a request for that name could mean either; choose another name",
            field="name",
            value=wanted.name,
            remedy="choose a name that no adapter has",
            code="name_taken",
        )
    revision = BaseModelRevision(name=wanted.name, status=PENDING, source=wanted.source.given(), upstream_names=_upstream_names(wanted))
    try:
        with session.begin_nested():
            session.add(revision)
    except IntegrityError as error:
        raise Conflict(f"base model {wanted.name!r} was registered a moment ago", field="name", value=wanted.name) from error
    return revision, _start_import(session, subject, revision, action="base_model.registered", before=None)


def _start_import(
    session: WriteSession, subject: Subject, revision: BaseModelRevision, *, action: str, before: dict[str, Any] | None
) -> Job:
    job = jobs.enqueue(
        session,
        kind=jobs.IMPORT_BASE_MODEL,
        tenant_id=None,
        subject_id=subject.key_id,
        payload={"base_model_id": revision.id, "source": revision.source, "secret_tenant_id": subject.tenant_id},
    )
    audit.record(session, subject, action, RESOURCE, revision.id, before=before, after=shown(revision))
    return job


def _upstream_names(wanted: BaseModelIn) -> list[str]:
    """A model of a hub is called there what it is called: adapters' configs name it so."""
    own = [HubLocation.parse(wanted.source.location).repo] if wanted.source.kind == "hub" else []
    return list(dict.fromkeys([*wanted.upstream_names, *own]))


def _import_under_way(session: WriteSession, subject: Subject, revision: BaseModelRevision) -> Job | None:
    """The job of a pending model; a new one where the old one was cancelled or lost."""
    if revision.status != PENDING:
        return None
    return repository.live_import(session, revision.id) or _start_import(
        session, subject, revision, action="base_model.retried", before=shown(revision)
    )


def _refuse_change(revision: BaseModelRevision, wanted: BaseModelIn) -> None:
    if revision.source == wanted.source.given() and set(revision.upstream_names) == set(_upstream_names(wanted)):
        return
    raise Conflict(
        f"base model {revision.name!r} is registered from {revision.source['location']!r} with other particulars, and is {revision.status}",
        field="name",
        value=revision.name,
        remedy="choose another name, or delete it first",
        code="base_model_exists",
    )


def _no_choice(*, named: str | None, upstream: str | None, matches: list[BaseModelRevision]) -> Invalid:
    upstream = printable(upstream or "")  # a stranger's config may hold anything of any length
    if matches:
        names = ", ".join(revision.name for revision in matches)
        return Invalid(
            f"base_model_name_or_path {upstream!r} is an upstream name of {names}; say in base_model which one",
            field="base_model",
            value=upstream,
            remedy=f"base_model: one of {names}",
            code="base_model_ambiguous",
        )
    if named is not None:
        return Invalid(
            f"base_model {named!r} is not registered; choose one of GET /api/v1/base-models",
            field="base_model",
            value=named,
            remedy="GET /api/v1/base-models",
            code="base_model_unknown",
        )
    return Invalid(
        f"base_model_name_or_path {upstream!r} is no registered base model's name; say in base_model which one the adapter is for",
        field="base_model",
        value=upstream,
        remedy="base_model: a name of GET /api/v1/base-models",
        code="base_model_unknown",
    )
