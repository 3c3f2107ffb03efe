"""Rules of aliases: they move by compare-and-swap on their generation, and keep their history."""

from __future__ import annotations

from typing import Literal

from registry.adapters import alias_rows
from registry.adapters.alias_rows import Pointable, Pointing
from registry.adapters.models import READY, Adapter, AdapterVersion
from registry.audit import service as audit
from registry.db import WriteSession
from registry.errors import Conflict, Invalid, NotFound, PreconditionFailed
from registry.tenants.auth import Subject, TenantSubject

# What the caller believes: this generation, that there is none, or that there is one.
Expected = int | Literal["absent", "any"]


def put(
    session: WriteSession, subject: TenantSubject, adapter: Adapter, name: str, *, number: int, expected: Expected
) -> tuple[Pointing, bool]:
    """Point the alias at a ready version. True where it is new. Call under `lock_adapter`.

    Raises PreconditionFailed where `expected` does not hold, Invalid for an absent version, Conflict for one not ready.
    """
    alias = alias_rows.alias(session, adapter.tenant_id, adapter.id, name)
    _compare(alias, name, expected=expected)
    version = _ready_version(session, adapter, number)
    if alias is None:
        return create(session, subject, adapter, name, version=version, moved_by=subject.key_id), True
    if alias.version_id == version.id:
        return alias, False
    moved = alias_rows.move(session, adapter.tenant_id, alias, to=version, by=subject.key_id)
    _keep_move(session, subject, adapter, moved, number=number, before=alias)
    return moved, False


def create(
    session: WriteSession, subject: Subject, adapter: Adapter, name: str, *, version: Pointable | AdapterVersion, moved_by: str
) -> Pointing:
    """Also for the `default` that the first ready version sets, where `subject` is SYSTEM: a worker did it."""
    to = Pointable(version.id, version.number, version.version_digest, version.status)
    generation = alias_rows.last_generation(session, adapter.tenant_id, adapter.id, name) + 1
    alias = alias_rows.add(session, adapter.tenant_id, adapter.id, name, to=to, generation=generation, by=moved_by)
    _keep_move(session, subject, adapter, alias, number=version.number, before=None)
    return alias


def remove(session: WriteSession, subject: TenantSubject, adapter: Adapter, name: str, *, expected: Expected) -> None:
    """Call under `lock_adapter`. Raises NotFound, PreconditionFailed."""
    alias = alias_rows.alias(session, adapter.tenant_id, adapter.id, name)
    if alias is None:
        raise not_found(adapter, name)
    _compare(alias, name, expected=expected)
    _remove(session, subject, adapter, alias)


def remove_all(session: WriteSession, subject: TenantSubject, adapter: Adapter, *, version_id: str | None = None) -> None:
    """Every alias of the adapter, or of one version."""
    for alias in alias_rows.aliases(session, adapter.tenant_id, adapter.id, version_id=version_id):
        _remove(session, subject, adapter, alias)


def not_found(adapter: Adapter, name: str) -> NotFound:
    return NotFound(
        f"adapter {adapter.name!r} has no alias {name!r}",
        field="alias",
        value=name,
        remedy=f"GET /api/v1/adapters/{adapter.name}/aliases",
        code="alias_not_found",
    )


def _remove(session: WriteSession, subject: TenantSubject, adapter: Adapter, alias: Pointing) -> None:
    gone = alias._replace(generation=alias.generation + 1, updated_by=subject.key_id)
    _keep_move(session, subject, adapter, gone, number=None, before=alias)
    alias_rows.remove(session, adapter.tenant_id, alias)


def _keep_move(
    session: WriteSession, subject: Subject, adapter: Adapter, now: Pointing, *, number: int | None, before: Pointing | None
) -> None:
    alias_rows.keep_move(session, adapter.tenant_id, adapter.id, now.name, generation=now.generation, number=number, by=now.updated_by)
    was = None if before is None else {"number": before.number, "generation": before.generation}
    after = {"adapter": adapter.name, "alias": now.name, "number": number, "generation": now.generation}
    audit.record(session, subject, "alias.moved", "alias", now.id, before=was, after=after, tenant_id=adapter.tenant_id)


def _compare(alias: Pointing | None, name: str, *, expected: Expected) -> None:
    generation = None if alias is None else alias.generation
    holds = {"absent": alias is None, "any": alias is not None}.get(str(expected), generation == expected)
    if not holds:
        state = "does not exist" if generation is None else f"is at generation {generation}"
        raise PreconditionFailed(
            f"alias {name!r} {state}, which is not what the request expected ({expected}); read it and decide again",
            field="If-Match",
            value=expected,
            remedy="GET the alias and send its ETag",
        )


def _ready_version(session: WriteSession, adapter: Adapter, number: int) -> Pointable:
    version = alias_rows.version(session, adapter.tenant_id, adapter.id, number)
    if version is None:
        raise Invalid(
            f"adapter {adapter.name!r} has no version {number}; choose one that it has",
            field="version",
            value=number,
            remedy=f"GET /api/v1/adapters/{adapter.name}/versions",
            code="version_unknown",
        )
    if version.status != READY:
        raise Conflict(
            f"version {number} is {version.status}, and an alias may only point at a ready one",
            field="version",
            value=number,
            remedy="wait until it is ready, or choose another",
            code="version_not_ready",
        )
    return version
