"""`/tenants`, `/keys` and `/whoami`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import Conflict, Forbidden, Invalid, NotFound, problem_responses
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.tenants import repository, rotation, service
from registry.tenants.auth import Subject, SubjectDep, allow
from registry.tenants.keys import ADMIN
from registry.tenants.models import ApiKey, Tenant
from registry.tenants.schemas import KeyCreated, KeyIn, KeyOut, KeyRotated, KeyRotationIn, TenantIn, TenantOut, WhoAmI
from registry.tenants.service import Recorder

router = APIRouter(tags=["tenants"], route_class=Route)

Admin = Annotated[Subject, Depends(allow(ADMIN))]
KeyAdmin = Annotated[Subject, Depends(allow("keys:write"))]


def _recorder(request: Request) -> Recorder:
    recorder: Recorder = request.app.state.record
    return recorder


RecorderDep = Annotated[Recorder, Depends(_recorder)]


@router.get("/whoami")
def whoami(subject: SubjectDep) -> WhoAmI:
    """What the key of this request is."""
    prefixes = None if subject.adapter_prefixes is None else list(subject.adapter_prefixes)
    return WhoAmI(
        key_id=subject.key_id,
        tenant=subject.tenant,
        scopes=sorted(subject.scopes),
        adapter_prefixes=prefixes,
        expires_at=subject.expires_at,
    )


@router.post("/tenants", status_code=201, responses=problem_responses(Conflict))
def create_tenant(body: TenantIn, subject: Admin, session: WriteSessionDep, record: RecorderDep) -> TenantOut:
    return _tenant_out(service.create_tenant(session, subject=subject, name=body.name, record=record))


@router.get("/tenants", dependencies=[Depends(allow(ADMIN))])
def list_tenants(
    session: ReadSessionDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    show_deleted: Annotated[bool, Query(description="Deleted ones too.")] = False,
) -> Page[TenantOut]:
    rows = repository.list_tenants(session, limit=limit, cursor=cursor, with_deleted=show_deleted)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=_tenant_out)


@router.get("/tenants/{name}", responses=problem_responses(NotFound), dependencies=[Depends(allow(ADMIN))])
def get_tenant(name: str, session: ReadSessionDep) -> TenantOut:
    return _tenant_out(service.get_tenant(session, name))


@router.delete("/tenants/{name}", status_code=204, responses=problem_responses(NotFound))
def delete_tenant(name: str, subject: Admin, session: WriteSessionDep, record: RecorderDep) -> None:
    """Its keys stop at once; its adapters are no longer served. Its bytes go when the retention time is over, or by a purge."""
    service.delete_tenant(session, subject=subject, name=name, record=record)


@router.post("/tenants/{name}/restore", responses=problem_responses(NotFound, Conflict))
def restore_tenant(name: str, subject: Admin, session: WriteSessionDep, record: RecorderDep) -> TenantOut:
    """Undo the deletion: its keys work again. What was purged meanwhile stays purged."""
    return _tenant_out(service.restore_tenant(session, subject=subject, name=name, record=record))


@router.post("/tenants/{name}/purge", status_code=202, responses=problem_responses(NotFound, Conflict))
def purge_tenant(name: str, subject: Admin, session: WriteSessionDep, record: RecorderDep) -> TenantOut:
    """The next collections give up every byte of a deleted tenant. It cannot be restored after that."""
    return _tenant_out(service.request_purge(session, subject=subject, name=name, record=record))


@router.post("/keys", status_code=201)
def create_key(body: KeyIn, request: Request, subject: KeyAdmin, session: WriteSessionDep, record: RecorderDep) -> KeyCreated:
    """The token is in this answer and never again. A key cannot grant scopes, adapters or a lifetime that its creator lacks."""
    key, token = service.create_key(
        session,
        subject=subject,
        name=body.name,
        scopes=body.scopes,
        adapter_prefixes=body.adapter_prefixes,
        expires_in_s=body.expires_in_s,
        hasher=request.app.state.key_hasher,
        record=record,
    )
    return KeyCreated(token=token, **_key_out((key, subject.tenant)).model_dump())


@router.get("/keys")
def list_keys(subject: KeyAdmin, session: ReadSessionDep, limit: Limit = 50, cursor: Cursor = None) -> Page[KeyOut]:
    """Keys of the tenant; an admin who names no tenant sees all, a key with `adapter_prefixes` those with none but its own."""
    rows = service.list_keys(session, subject, limit=limit, cursor=cursor)
    return make_page(rows, limit=limit, key=lambda row: (row[0].created_at, row[0].id), show=_key_out)


@router.delete("/keys/{key_id}", status_code=204, responses=problem_responses(NotFound))
def revoke_key(key_id: str, subject: KeyAdmin, session: WriteSessionDep, record: RecorderDep) -> None:
    """Revoke; the key stops at once."""
    service.revoke_key(session, subject=subject, key_id=key_id, record=record)


@router.post("/keys/{key_id}/rotate", responses=problem_responses(Conflict, Forbidden, Invalid, NotFound))
def rotate_key(
    key_id: str, body: KeyRotationIn, *, request: Request, subject: KeyAdmin, session: WriteSessionDep, record: RecorderDep
) -> KeyRotated:
    """A successor with the same rights, its token in this answer and never again; the old key still works for the overlap."""
    state = request.app.state
    made = rotation.rotate_key(
        session, subject=subject, key_id=key_id, wanted=body, hasher=state.key_hasher, settings=state.settings, record=record
    )
    assert made.predecessor.expires_at is not None, "a rotated key has an end"
    tenant = service.tenant_name(session, made.successor.tenant_id)
    shown = _key_out((made.successor, tenant)).model_dump()
    return KeyRotated(token=made.token, predecessor_id=made.predecessor.id, predecessor_expires_at=made.predecessor.expires_at, **shown)


def _tenant_out(tenant: Tenant) -> TenantOut:
    return TenantOut(
        id=tenant.id,
        name=tenant.name,
        created_at=tenant.created_at,
        deleted_at=tenant.deleted_at,
        purge_requested_at=tenant.purge_requested_at,
    )


def _key_out(row: tuple[ApiKey, str | None]) -> KeyOut:
    key, tenant = row
    return KeyOut(
        id=key.id,
        name=key.name,
        tenant=tenant,
        scopes=key.scopes,
        adapter_prefixes=key.adapter_prefixes,
        created_at=key.created_at,
        created_by=key.created_by,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        last_used_at=key.last_used_at,
        successor_id=key.successor_id,
    )
