"""Rules of asking for an import: which hub may be named, what the adapter is called, and the job that does it."""

from __future__ import annotations

import re

from registry.audit import service as audit
from registry.config import Settings
from registry.db import ReadSession, WriteSession
from registry.errors import Invalid
from registry.hub.schemas import ImportIn
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.secrets import repository as secrets
from registry.tenants.auth import TenantSubject
from registry.text import NAME_PATTERN


def request_import(session: WriteSession, subject: TenantSubject, wanted: ImportIn, *, settings: Settings) -> tuple[Job, str]:
    """The job and the adapter's name. Raises Invalid for an endpoint that the operator does not list, and for no such secret.

    The endpoint decides where a worker connects to and to whom it shows the tenant's token, so it is never free text.
    """
    _check_endpoint(wanted.endpoint, settings=settings)
    _check_secret(session, subject, wanted.token_secret)
    name = wanted.name or _name_of(wanted.repo)
    subject.must_name(name)
    payload = wanted.model_dump() | {"name": name, "tenant": subject.tenant}
    job = jobs.enqueue(session, kind=jobs.IMPORT_HUB, tenant_id=subject.tenant_id, subject_id=subject.key_id, adapter=name, payload=payload)
    audit.record(session, subject, "import.requested", "job", job.id, after=payload, tenant_id=subject.tenant_id)
    return job, name


def _check_endpoint(endpoint: str | None, *, settings: Settings) -> None:
    if endpoint is not None and endpoint not in settings.hub_endpoints:
        raise Invalid(
            "endpoint is none of the hubs that this installation imports from; leave it out for the Hugging Face Hub",
            field="endpoint",
            value=endpoint,
            remedy="ask the operator to list it in LORARY_HUB_ENDPOINTS, and write it as it stands there",
            code="endpoint_not_allowed",
        )


def _check_secret(session: ReadSession, subject: TenantSubject, name: str | None) -> None:
    if name is not None and secrets.find(session, subject.tenant_id, name) is None:
        raise Invalid(
            f"there is no secret named {name!r}",
            field="token_secret",
            value=name,
            remedy=f"PUT /api/v1/secrets/{name}",
            code="secret_unknown",
        )


def _name_of(repo: str) -> str:
    name = repo.rpartition("/")[2].lower()
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise Invalid(
            f"the repository's own name {name!r} cannot be an adapter's; say what it shall be called",
            field="name",
            value=name,
            remedy="name: small letters, digits, '.', '_', '-', at most 63 characters",
        )
    return name
