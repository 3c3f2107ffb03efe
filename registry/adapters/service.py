"""Rules of adapters and versions: names, references, listing. Pushing is in `push`, aliases in `aliases`, deletion in `deletion`."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.adapters import repository, search, signatures
from registry.adapters.listing import Described
from registry.adapters.models import Adapter, AdapterVersion
from registry.adapters.schemas import MAX_TAGS, AdapterOut, AdapterPatch, FileOut, FormOut, VersionOut
from registry.audit import service as audit
from registry.base_models.schemas import Failure
from registry.db import ReadSession, WriteSession
from registry.errors import Invalid, NotFound
from registry.quotas.schemas import Measure
from registry.quotas.service import measure
from registry.tenants.auth import TenantSubject

DEFAULT_ALIAS = "default"

measure(Measure.ADAPTERS, repository.num_adapters)
measure(Measure.VERSIONS, repository.num_versions_today)

_REFERENCE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})(@(?P<at>[a-z0-9][a-z0-9._-]{0,62}))?")


@dataclass(frozen=True)
class Reference:
    """A model name taken apart. Exactly one of `number` and `alias` is set."""

    name: str
    number: int | None = None
    alias: str | None = None


def parse_reference(model: str) -> Reference:
    """`name` (alias `default`), `name@3` or `name@alias`. Raises Invalid for anything else."""
    match = _REFERENCE.fullmatch(model)
    if match is None or ((match["at"] or "").isdigit() and not 0 < int(match["at"]) < 2**31):
        raise Invalid(
            f"model {model[:200]!r} is no model name; write name, name@3 or name@alias",
            field="model",
            value=model,
            remedy="name, name@3 or name@alias, in lower case",
            code="invalid_reference",
        )
    name, at = match["name"], match["at"] or DEFAULT_ALIAS
    return Reference(name, number=int(at)) if at.isdigit() else Reference(name, alias=at)


def get_adapter(session: ReadSession, tenant_id: str, name: str, *, with_deleted: bool = False) -> Adapter:
    """Raises NotFound, the same for an absent, a deleted and another tenant's adapter."""
    adapter = repository.adapter(session, tenant_id, name, with_deleted=with_deleted)
    if adapter is None:
        raise adapter_not_found(name)
    return adapter


def lock_adapter(session: WriteSession, tenant_id: str, name: str) -> Adapter:
    """`get_adapter` for a change of its versions or aliases: they change one after the other."""
    adapter = repository.lock_named(session, tenant_id, name)
    if adapter is None:
        raise adapter_not_found(name)
    return adapter


def get_version(session: ReadSession, tenant_id: str, name: str, number: int, *, with_deleted: bool = False) -> AdapterVersion:
    adapter = get_adapter(session, tenant_id, name, with_deleted=with_deleted)
    version = repository.version(session, tenant_id, adapter.id, number, with_deleted=with_deleted)
    if version is None:
        raise version_not_found(name, number)
    return version


def file_digest(version: AdapterVersion, path: str) -> str:
    """sha256 of one of the version's files. Raises NotFound."""
    for file in version.manifest["files"]:
        if file["path"] == path:
            return str(file["sha256"])
    raise NotFound(f"version {version.number} has no file {path!r}", field="path", value=path, code="file_not_found")


def purged_from(deleted_at: dt.datetime | None, *, retention_s: float) -> dt.datetime | None:
    """When the GC may give up what was deleted then; None: never, or not deleted."""
    return None if deleted_at is None or not retention_s else deleted_at + dt.timedelta(seconds=retention_s)


def describe(adapter: Described, *, retention_s: float) -> AdapterOut:
    return AdapterOut(
        name=adapter.name,
        base_model=adapter.base_model,
        description=adapter.description,
        tags=adapter.tags,
        num_versions=adapter.num_versions,
        latest_version=adapter.latest_version,
        aliases=adapter.aliases,
        created_at=adapter.created_at,
        updated_at=adapter.updated_at,
        deleted_at=adapter.deleted_at,
        restorable_until=purged_from(adapter.deleted_at, retention_s=retention_s),
    )


def describe_version(version: AdapterVersion, *, retention_s: float) -> VersionOut:
    return VersionOut(
        adapter=version.adapter.name,
        number=version.number,
        version_digest=version.version_digest,
        status=version.status,
        reason=Failure(**version.reason) if version.reason else None,
        base_model=version.base_model.name,
        rank=version.rank,
        targets=version.targets,
        num_params=version.num_params,
        size_bytes=version.size_bytes,
        files=[FileOut(**file) for file in version.manifest["files"]],
        forms=[FormOut(kind=form.kind, form_digest=form.form_digest, size_bytes=form.size_bytes) for form in version.forms],
        signature=signatures.describe(version),
        created_at=version.created_at,
        created_by=version.created_by,
        deleted_at=version.deleted_at,
        restorable_until=None if version.purged_at else purged_from(version.deleted_at, retention_s=retention_s),
        purged_at=version.purged_at,
    )


def update(session: WriteSession, subject: TenantSubject, name: str, patch: AdapterPatch) -> Adapter:
    adapter = lock_adapter(session, subject.tenant_id, name)
    change = patch.model_dump(exclude_none=True, include={"description", "tags"})
    if patch.add_tags is not None or patch.remove_tags is not None:
        change["tags"] = _retagged(adapter.tags, add=patch.add_tags or [], remove=patch.remove_tags or [])
    describe_anew(session, subject, adapter, change)
    return get_adapter(session, subject.tenant_id, name)


def describe_anew(session: WriteSession, subject: TenantSubject, adapter: Adapter, change: Mapping[str, Any]) -> None:
    """Set description or tags, with index and record, where they differ. Call under `lock_adapter`."""
    before = {key: getattr(adapter, key) for key in change}
    if change == before:
        return
    for key, value in change.items():
        setattr(adapter, key, value)
    session.flush()
    session.refresh(adapter, ["updated_at"])
    search.index(session, adapter)
    audit.record(session, subject, "adapter.updated", "adapter", adapter.id, before=before, after=change)


def _retagged(tags: Sequence[str], *, add: Sequence[str], remove: Sequence[str]) -> list[str]:
    kept = list(dict.fromkeys(tag for tag in (*tags, *add) if tag not in remove))
    if len(kept) > MAX_TAGS:
        raise Invalid(
            f"the adapter would have {len(kept)} tags, at most {MAX_TAGS}", field="add_tags", value=len(kept), remedy="remove some"
        )
    return kept


def version_not_found(name: str, number: int) -> NotFound:
    return NotFound(
        f"adapter {name!r} has no version {number}",
        field="number",
        value=number,
        remedy=f"GET /api/v1/adapters/{name}/versions",
        code="version_not_found",
    )


def adapter_not_found(name: str) -> NotFound:
    """One answer for what never was, what is deleted and what is not the caller's."""
    return NotFound(
        f"there is no adapter named {name!r}", field="name", value=name, remedy="GET /api/v1/adapters", code="adapter_not_found"
    )
