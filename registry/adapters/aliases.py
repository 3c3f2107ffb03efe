"""Rules of aliases: they move by compare-and-swap on their generation, and keep their history."""

from __future__ import annotations

from typing import Literal

from registry.adapters import repository
from registry.adapters.models import READY, Adapter, AdapterVersion, Alias, AliasMove
from registry.audit import service as audit
from registry.db import WriteSession
from registry.errors import Conflict, Invalid, NotFound, PreconditionFailed
from registry.tenants.auth import Subject, TenantSubject

# What the caller believes: this generation, that there is none, or that there is one.
Expected = int | Literal["absent", "any"]


def put(
    session: WriteSession, subject: TenantSubject, adapter: Adapter, name: str, *, number: int, expected: Expected
) -> tuple[Alias, bool]:
    """Point the alias at a ready version. True where it is new. Call under `lock_adapter`.

    Raises PreconditionFailed where `expected` does not hold, Invalid for an absent version, Conflict for one not ready.
    """
    alias = repository.alias(session, adapter.tenant_id, adapter.id, name)
    _compare(alias, name, expected=expected)
    version = _ready_version(session, adapter, number)
    if alias is None:
        return create(session, subject, adapter, name, version=version, moved_by=subject.key_id), True
    if alias.version_id != version.id:
        before = {"number": alias.version.number, "generation": alias.generation}
        alias.version, alias.updated_by, alias.generation = version, subject.key_id, alias.generation + 1
        _keep_move(session, subject, alias, number=number, before=before)
    return alias, False


def create(session: WriteSession, subject: Subject, adapter: Adapter, name: str, *, version: AdapterVersion, moved_by: str) -> Alias:
    """Also for the `default` that the first ready version sets, where `subject` is SYSTEM: a worker did it."""
    generation = repository.last_generation(session, adapter.tenant_id, adapter.id, name) + 1
    alias = Alias(
        tenant_id=adapter.tenant_id, adapter_id=adapter.id, name=name, version=version, generation=generation, updated_by=moved_by
    )
    session.add(alias)
    _keep_move(session, subject, alias, number=version.number, before=None)
    return alias


def remove(session: WriteSession, subject: TenantSubject, adapter: Adapter, name: str, *, expected: Expected) -> None:
    """Call under `lock_adapter`. Raises NotFound, PreconditionFailed."""
    alias = repository.alias(session, adapter.tenant_id, adapter.id, name)
    if alias is None:
        raise not_found(adapter, name)
    _compare(alias, name, expected=expected)
    _remove(session, subject, alias)


def remove_all(session: WriteSession, subject: TenantSubject, adapter: Adapter, *, version_id: str | None = None) -> None:
    """Every alias of the adapter, or of one version."""
    for alias in repository.aliases(session, adapter.tenant_id, adapter.id, version_id=version_id):
        _remove(session, subject, alias)


def not_found(adapter: Adapter, name: str) -> NotFound:
    return NotFound(
        f"adapter {adapter.name!r} has no alias {name!r}",
        field="alias",
        value=name,
        remedy=f"GET /api/v1/adapters/{adapter.name}/aliases",
        code="alias_not_found",
    )


def _remove(session: WriteSession, subject: TenantSubject, alias: Alias) -> None:
    before = {"number": alias.version.number, "generation": alias.generation}
    alias.generation, alias.updated_by = alias.generation + 1, subject.key_id
    _keep_move(session, subject, alias, number=None, before=before)
    session.delete(alias)
    session.flush()


def _keep_move(session: WriteSession, subject: Subject, alias: Alias, *, number: int | None, before: dict[str, int] | None) -> None:
    session.add(
        AliasMove(
            tenant_id=alias.tenant_id,
            adapter_id=alias.adapter_id,
            name=alias.name,
            generation=alias.generation,
            number=number,
            moved_by=alias.updated_by,
        )
    )
    session.flush()
    adapter = session.get_one(Adapter, alias.adapter_id)
    after = {"adapter": adapter.name, "alias": alias.name, "number": number, "generation": alias.generation}
    audit.record(session, subject, "alias.moved", "alias", alias.id, before=before, after=after, tenant_id=alias.tenant_id)


def _compare(alias: Alias | None, name: str, *, expected: Expected) -> None:
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


def _ready_version(session: WriteSession, adapter: Adapter, number: int) -> AdapterVersion:
    version = repository.version(session, adapter.tenant_id, adapter.id, number)
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
