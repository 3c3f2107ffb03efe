"""`/adapters`: adapters, versions, aliases. The push reads bytes between its two units of work, never inside one."""

from __future__ import annotations

import re
from functools import partial
from inspect import unwrap
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from registry import metrics
from registry.adapters import alias_rows, aliases, card, card_markdown, deletion, lineage, listing, push, push_check, repository, service
from registry.adapters.alias_rows import Pointing
from registry.adapters.aliases import Expected
from registry.adapters.models import Adapter, AliasMove
from registry.adapters.schemas import (
    AdapterName,
    AdapterOut,
    AdapterPatch,
    AliasIn,
    AliasMoveOut,
    AliasName,
    AliasOut,
    CardOut,
    FilePath,
    LineageOut,
    PurgeOut,
    PushIn,
    PushOut,
    SearchDep,
    VersionNumber,
    VersionOut,
)
from registry.blobs import service as blobs
from registry.blobs.endpoints import REDIRECTS, BlobStoreDep, RangeHeader, SettingsDep, blob_or_redirect
from registry.config import Settings
from registry.db import DatabaseDep, ReadSession, ReadSessionDep, WriteSessionDep
from registry.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    PreconditionFailed,
    PreconditionRequired,
    QuotaExceeded,
    RateLimited,
    problem_responses,
)
from registry.pagination import Cursor, Limit, Page, make_page
from registry.quotas.endpoints import DefaultsDep
from registry.routing import Route
from registry.tenants.auth import SubjectDep, TenantSubject, require


async def _within_the_keys_limits(request: Request, subject: SubjectDep) -> None:
    """Before every route here, so that none can forget it: a name outside a key's prefixes is the name of nothing.

    Only a push makes what is not there, so it says why it does not.
    """
    name = request.path_params.get("name")
    if name is None or subject.may_name(name):
        return
    if unwrap(request.scope["endpoint"]) is push_version:
        subject.must_name(name)
    raise service.adapter_not_found(name)


router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=Route, dependencies=[Depends(_within_the_keys_limits)])

Reader = Annotated[TenantSubject, Depends(require("adapters:read"))]
Writer = Annotated[TenantSubject, Depends(require("adapters:write"))]
AliasWriter = Annotated[TenantSubject, Depends(require("aliases:write"))]
IfMatch = Annotated[str | None, Header(max_length=64, description="The ETag that the alias must still have.")]
IfNoneMatch = Annotated[str | None, Header(max_length=64, description="`*`: the alias must not exist yet.")]

MARKDOWN = "text/markdown"
CardFormat = Annotated[Literal["json", "markdown"], Query(description="`markdown`: with YAML front matter, as the Hub reads it.")]
ShowDeleted = Annotated[bool, Query(description="Also what was deleted and not forgotten, with its times.")]

READ_ERRORS = problem_responses(BadRequest, Forbidden, NotFound, Invalid)


@router.get("", responses=problem_responses(BadRequest, Forbidden, Invalid))
def list_adapters(
    *,
    subject: Reader,
    session: ReadSessionDep,
    settings: SettingsDep,
    search: SearchDep,
    cursor: Cursor = None,
    limit: Limit = 50,
    show_deleted: ShowDeleted = False,
) -> Page[AdapterOut]:
    """The tenant's adapters, or those that match every part of a search; newest first."""
    rows = listing.page(
        session,
        subject.tenant_id,
        search=search,
        cursor=cursor,
        limit=limit,
        prefixes=subject.adapter_prefixes,
        with_deleted=show_deleted,
    )
    show = partial(service.describe, retention_s=settings.deleted_retention_s)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=show)


@router.get("/{name}", responses=READ_ERRORS)
def get_adapter(
    name: AdapterName, *, subject: Reader, session: ReadSessionDep, settings: SettingsDep, show_deleted: ShowDeleted = False
) -> AdapterOut:
    adapter = service.get_adapter(session, subject.tenant_id, name, with_deleted=show_deleted)
    return _describe(session, adapter, settings)


@router.patch("/{name}", responses=READ_ERRORS)
def patch_adapter(
    name: AdapterName, patch: AdapterPatch, *, subject: Writer, session: WriteSessionDep, settings: SettingsDep
) -> AdapterOut:
    """Change description or tags; what is left out stays."""
    return _describe(session, service.update(session, subject, name, patch), settings)


@router.delete("/{name}", status_code=204, responses=READ_ERRORS)
def delete_adapter(name: AdapterName, *, subject: Writer, session: WriteSessionDep) -> None:
    """It stops resolving at once and can be restored; a push to the same name takes it up again, and goes on counting versions."""
    deletion.delete_adapter(session, subject, name)


@router.post("/{name}/restore", responses=READ_ERRORS | problem_responses(Conflict, QuotaExceeded))
def restore_adapter(
    name: AdapterName, *, subject: Writer, session: WriteSessionDep, settings: SettingsDep, defaults: DefaultsDep
) -> AdapterOut:
    """Undo the deletion: the adapter with the versions and aliases that it took along. 409 once they are purged."""
    deletion.restore_adapter(session, subject, name, defaults=defaults)
    return _describe(session, service.get_adapter(session, subject.tenant_id, name), settings)


@router.post("/{name}/purge", responses=READ_ERRORS)
def purge_adapter(name: AdapterName, *, subject: Writer, session: WriteSessionDep, settings: SettingsDep) -> PurgeOut:
    """Give up the bytes of every deleted version for good, without waiting for the retention time."""
    return PurgeOut(purged=deletion.purge_deleted(session, subject, name, settings=settings))


@router.post(
    "/{name}/versions",
    status_code=201,
    responses=problem_responses(BadRequest, Forbidden, QuotaExceeded, Invalid, Conflict, RateLimited)
    | {200: {"description": "These bytes are a version already.", "model": PushOut}},
)
def push_version(
    name: AdapterName,
    wanted: PushIn,
    *,
    response: Response,
    subject: Writer,
    database: DatabaseDep,
    store: BlobStoreDep,
    settings: SettingsDep,
    defaults: DefaultsDep,
) -> PushOut:
    """Name uploaded blobs as a version, creating the adapter where there is none.

    What config and header alone can refuse is refused here; a job checks the weights, then the version is ready.
    """
    checked = push_check.check(database, store, subject.tenant_id, wanted, max_rank=settings.max_adapter_rank, defaults=defaults)
    with database.write() as session:
        recorded = push.record(session, subject, name, wanted, checked, defaults=defaults)
        shown = recorded.version or _read_back(session, subject.tenant_id, recorded.version_id, settings)
    metrics.pushes.labels("created" if recorded.created else "repeated").inc()
    response.status_code = 201 if recorded.created else 200
    response.headers["Location"] = f"/api/v1/adapters/{name}/versions/{shown.number}"
    return PushOut(**dict(shown), job_id=recorded.job_id)


@router.get("/{name}/versions", responses=READ_ERRORS)
def list_versions(
    name: AdapterName,
    *,
    subject: Reader,
    session: ReadSessionDep,
    settings: SettingsDep,
    cursor: Cursor = None,
    limit: Limit = 50,
    show_deleted: ShowDeleted = False,
) -> Page[VersionOut]:
    """Highest number first."""
    adapter = service.get_adapter(session, subject.tenant_id, name, with_deleted=show_deleted)
    rows = repository.versions_page(session, subject.tenant_id, adapter.id, cursor=cursor, limit=limit, with_deleted=show_deleted)
    show = partial(service.describe_version, retention_s=settings.deleted_retention_s)
    return make_page(rows, limit=limit, key=lambda row: repository.number_key(row.created_at, row.number), show=show)


@router.get("/{name}/versions/{number}", responses=READ_ERRORS)
def get_version(
    name: AdapterName,
    number: VersionNumber,
    *,
    subject: Reader,
    session: ReadSessionDep,
    settings: SettingsDep,
    show_deleted: ShowDeleted = False,
) -> VersionOut:
    version = service.get_version(session, subject.tenant_id, name, number, with_deleted=show_deleted)
    return service.describe_version(version, retention_s=settings.deleted_retention_s)


@router.delete("/{name}/versions/{number}", status_code=204, responses=READ_ERRORS)
def delete_version(name: AdapterName, number: VersionNumber, *, subject: Writer, session: WriteSessionDep) -> None:
    """It stops resolving at once, and aliases that point at it are removed. It can be restored; pushing its bytes does so too."""
    deletion.delete_version(session, subject, name, number)


@router.post("/{name}/versions/{number}/restore", responses=READ_ERRORS | problem_responses(Conflict))
def restore_version(
    name: AdapterName, number: VersionNumber, *, subject: Writer, session: WriteSessionDep, settings: SettingsDep
) -> PushOut:
    """Undo the deletion, with the aliases that it took along where they are free. One that never was ready is checked again."""
    version, job_id = deletion.restore_version(session, subject, name, number)
    shown = service.describe_version(version, retention_s=settings.deleted_retention_s)
    return PushOut(**dict(shown), job_id=job_id)


@router.post("/{name}/versions/{number}/purge", responses=READ_ERRORS | problem_responses(Conflict))
def purge_version(
    name: AdapterName, number: VersionNumber, *, subject: Writer, session: WriteSessionDep, settings: SettingsDep
) -> VersionOut:
    """Give up a deleted version's bytes for good. They leave the store with the next collection, minutes later."""
    version = deletion.purge_version(session, subject, name, number, settings=settings)
    return service.describe_version(version, retention_s=settings.deleted_retention_s)


@router.get("/{name}/versions/{number}/lineage", responses=READ_ERRORS)
def get_lineage(name: AdapterName, number: VersionNumber, *, subject: Reader, session: ReadSessionDep) -> LineageOut:
    """What the version came from (who pushed it, which hub and commit, for which base model), and what was made of it."""
    return lineage.lineage_of(session, subject.tenant_id, name, number)


@router.get(
    "/{name}/versions/{number}/card",
    response_model=CardOut,
    responses=READ_ERRORS | {200: {"description": "The card.", "content": {MARKDOWN: {"schema": {"type": "string"}}}}},
)
def get_card(
    name: AdapterName, number: VersionNumber, *, subject: Reader, database: DatabaseDep, store: BlobStoreDep, format: CardFormat = "json"
) -> Response | CardOut:
    """Who pushed it, from what it was made, with what: facts, and the tenant's README.md beside them."""
    found = card.card_of(database, store, subject.tenant_id, name, number)
    if format == "json":
        return found
    headers = {"X-Content-Type-Options": "nosniff"}
    return Response(card_markdown.render(found), media_type=f"{MARKDOWN}; charset=utf-8", headers=headers)


@router.get("/{name}/versions/{number}/files/{path:path}", response_class=StreamingResponse, responses=READ_ERRORS | REDIRECTS)
def get_file(
    name: AdapterName,
    number: VersionNumber,
    path: FilePath,
    *,
    subject: Reader,
    database: DatabaseDep,
    store: BlobStoreDep,
    settings: SettingsDep,
    byte_range: RangeHeader = None,
) -> Response:
    """One file of a version, byte for byte as it was pushed; 307 to the store itself where the installation is set so."""
    with database.read() as session:
        version = service.get_version(session, subject.tenant_id, name, number)
        blob = blobs.get(session, subject.tenant_id, service.file_digest(version, path))
    return blob_or_redirect(store, blob, byte_range=byte_range, settings=settings)


@router.get("/{name}/aliases", responses=READ_ERRORS)
def list_aliases(name: AdapterName, *, subject: Reader, session: ReadSessionDep) -> list[AliasOut]:
    adapter = service.get_adapter(session, subject.tenant_id, name)
    return [_show_alias(alias) for alias in alias_rows.aliases(session, subject.tenant_id, adapter.id)]


@router.get("/{name}/aliases/{alias}", responses=READ_ERRORS)
def get_alias(name: AdapterName, alias: AliasName, *, response: Response, subject: Reader, session: ReadSessionDep) -> AliasOut:
    """The ETag is what `If-Match` of a move must carry."""
    adapter = service.get_adapter(session, subject.tenant_id, name)
    found = alias_rows.alias(session, subject.tenant_id, adapter.id, alias)
    if found is None:
        raise aliases.not_found(adapter, alias)
    return _with_etag(response, found)


@router.put(
    "/{name}/aliases/{alias}",
    responses=READ_ERRORS
    | problem_responses(Conflict, PreconditionFailed, PreconditionRequired)
    | {201: {"description": "The alias is new.", "model": AliasOut}},
)
def put_alias(
    name: AdapterName,
    alias: AliasName,
    wanted: AliasIn,
    *,
    response: Response,
    subject: AliasWriter,
    session: WriteSessionDep,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> AliasOut:
    """Compare-and-swap: `If-Match` with the ETag last read, or `If-None-Match: *` for a new alias."""
    expected = _expected(if_match, if_none_match)
    if expected is None:
        raise PreconditionRequired(
            "an alias moves only from a state that you have seen: send If-Match, or If-None-Match: * for a new one",
            field="If-Match",
            remedy="GET the alias and send its ETag as If-Match",
        )
    adapter = service.lock_adapter(session, subject.tenant_id, name)
    moved, created = aliases.put(session, subject, adapter, alias, number=wanted.version, expected=expected)
    response.status_code = 201 if created else 200
    return _with_etag(response, moved)


@router.delete("/{name}/aliases/{alias}", status_code=204, responses=READ_ERRORS | problem_responses(PreconditionFailed))
def delete_alias(name: AdapterName, alias: AliasName, *, subject: AliasWriter, session: WriteSessionDep, if_match: IfMatch = None) -> None:
    """`If-Match` is honoured where it is sent."""
    adapter = service.lock_adapter(session, subject.tenant_id, name)
    aliases.remove(session, subject, adapter, alias, expected=_expected(if_match, None) or "any")


@router.get("/{name}/aliases/{alias}/history", responses=READ_ERRORS)
def alias_history(
    name: AdapterName, alias: AliasName, *, subject: Reader, session: ReadSessionDep, cursor: Cursor = None, limit: Limit = 50
) -> Page[AliasMoveOut]:
    """Every move, newest first, also of an alias that is gone."""
    adapter = service.get_adapter(session, subject.tenant_id, name)
    rows = alias_rows.moves_page(session, subject.tenant_id, adapter.id, alias, cursor=cursor, limit=limit)
    return make_page(rows, limit=limit, key=lambda row: repository.number_key(row.moved_at, row.generation), show=_show_move)


def _describe(session: ReadSession, adapter: Adapter, settings: Settings) -> AdapterOut:
    return service.describe(listing.one(session, adapter), retention_s=settings.deleted_retention_s)


def _read_back(session: ReadSession, tenant_id: str, version_id: str, settings: Settings) -> VersionOut:
    version = repository.version_by_id(session, tenant_id, version_id)
    assert version is not None, "recorded in this very transaction"
    return service.describe_version(version, retention_s=settings.deleted_retention_s)


def _expected(if_match: str | None, if_none_match: str | None) -> Expected | None:
    """None where neither header was sent. Raises BadRequest for what is neither one ETag of ours nor `*`."""
    if if_match is None and if_none_match is None:
        return None
    if if_none_match == "*" and if_match is None:
        return "absent"
    if if_match == "*" and if_none_match is None:
        return "any"
    match = re.fullmatch(r'"(\d{1,9})"', if_match or "")
    if match is None or if_none_match is not None:
        raise BadRequest(
            f"If-Match {if_match!r} with If-None-Match {if_none_match!r} cannot be read; send one of them",
            field="If-Match",
            value=if_match,
            remedy='If-Match: "<generation>", or If-None-Match: *',
        )
    return int(match[1])


def _with_etag(response: Response, alias: Pointing) -> AliasOut:
    response.headers["ETag"] = f'"{alias.generation}"'
    return _show_alias(alias)


def _show_alias(alias: Pointing) -> AliasOut:
    return AliasOut(
        alias=alias.name,
        version=alias.number,
        version_digest=alias.version_digest,
        generation=alias.generation,
        updated_at=alias.updated_at,
        updated_by=alias.updated_by,
    )


def _show_move(move: AliasMove) -> AliasMoveOut:
    return AliasMoveOut(generation=move.generation, version=move.number, moved_at=move.moved_at, moved_by=move.moved_by)
