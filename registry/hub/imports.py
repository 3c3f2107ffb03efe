"""Rules of asking for an import: which hub may be named, what the adapter is called, and the job that does it."""

from __future__ import annotations

import re

from registry.audit import service as audit
from registry.base_models.hub_source import require_listed, require_secret
from registry.config import Settings
from registry.db import WriteSession
from registry.errors import Invalid
from registry.hub.schemas import ImportIn
from registry.jobs import service as jobs
from registry.jobs.models import Job
from registry.tenants.auth import TenantSubject
from registry.text import NAME_PATTERN


def request_import(session: WriteSession, subject: TenantSubject, wanted: ImportIn, *, settings: Settings) -> tuple[Job, str]:
    """The job and the adapter's name. Raises Invalid for an endpoint that the operator does not list, and for no such secret.

    The endpoint decides where a worker connects to and to whom it shows the tenant's token, so it is never free text.
    """
    require_listed(wanted.endpoint, settings=settings)
    require_secret(session, subject.tenant_id, wanted.token_secret)
    name = wanted.name or _name_of(wanted.repo)
    subject.must_name(name)
    payload = wanted.model_dump() | {"name": name, "tenant": subject.tenant}
    job = jobs.enqueue(session, kind=jobs.IMPORT_HUB, tenant_id=subject.tenant_id, subject_id=subject.key_id, adapter=name, payload=payload)
    audit.record(session, subject, "import.requested", "job", job.id, after=payload, tenant_id=subject.tenant_id)
    return job, name


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
