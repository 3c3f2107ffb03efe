"""Lineage of a version: what it came from, and what was made of it. Derived from rows and from the audit log.

Whoever brings a new way in which versions come about (a training job, a compression) adds a function to `CAME_FROM` or
`MADE_INTO`; links of a kind that a client does not know are links all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from registry.adapters import service
from registry.adapters.models import AdapterVersion
from registry.adapters.schemas import LineageOut, Link
from registry.audit import repository as audit
from registry.db import ReadSession
from registry.tenants import repository as tenants

MAX_IMPORTS = 50
HUGGING_FACE = "https://huggingface.co"

Links = Callable[[ReadSession, AdapterVersion], Iterable[Link]]


def lineage_of(session: ReadSession, tenant_id: str, name: str, number: int) -> LineageOut:
    """A constant number of statements. Raises NotFound."""
    version = service.get_version(session, tenant_id, name, number)
    return LineageOut(
        adapter=version.adapter.name,
        number=version.number,
        version_digest=version.version_digest,
        came_from=[link for links in CAME_FROM for link in links(session, version)],
        made_into=[link for links in MADE_INTO for link in links(session, version)],
    )


def _pushed_by(session: ReadSession, version: AdapterVersion) -> Iterable[Link]:
    key = tenants.find_key(session, version.tenant_id, version.created_by)
    details = {"name": key.name} if key else {}
    yield Link(relation="pushed_by", kind="key", id=version.created_by, at=version.created_at, details=details)


def _imported_from(session: ReadSession, version: AdapterVersion) -> Iterable[Link]:
    """Each commit whose bytes these are, latest first."""
    wanted = audit.Wanted(action="version.imported", resource_id=version.id)
    for event in audit.list_events(session, version.tenant_id, wanted, limit=MAX_IMPORTS, cursor=None)[:MAX_IMPORTS]:
        told = event.after or {}
        at = f"{told.get('endpoint') or HUGGING_FACE}/{told.get('repo')}@{told.get('commit')}"
        details = {name: told.get(name) for name in ("endpoint", "repo", "revision", "commit")}
        details |= {"key_id": event.key_id, "job_id": event.job_id}
        yield Link(relation="imported_from", kind="hub_commit", id=at, at=event.created_at, details=details)


def _made_for(_session: ReadSession, version: AdapterVersion) -> Iterable[Link]:
    base = version.base_model
    details = {"name": base.name, "upstream_names": base.upstream_names}
    yield Link(relation="made_for", kind="base_model", id=base.base_digest or base.name, at=None, details=details)


def _forms(_session: ReadSession, version: AdapterVersion) -> Iterable[Link]:
    for form in version.forms:
        details = {"kind": form.kind, "size_bytes": form.size_bytes}
        yield Link(relation="has_form", kind="form", id=form.form_digest, at=None, details=details)


CAME_FROM: tuple[Links, ...] = (_pushed_by, _imported_from, _made_for)
MADE_INTO: tuple[Links, ...] = (_forms,)
