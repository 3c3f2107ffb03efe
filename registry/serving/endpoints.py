"""`/api/v1` for replicas (register, heartbeat, resolve, pull) and operators; `/v1` for OpenAI clients."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import StreamingResponse

from registry.blobs import service as blobs
from registry.blobs.endpoints import BlobStoreDep, SettingsDep, blob_response
from registry.blobs.schemas import Sha256Path
from registry.db import DatabaseDep, ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, RateLimited, Unavailable, problem_responses
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.serving import inspection, repository, service
from registry.serving.front_door import FrontDoor
from registry.serving.grants import GrantSigner, signer_for
from registry.serving.names import Served
from registry.serving.schemas import ModelCard, ModelList, ReplicaOut
from registry.tenants.auth import Subject, TenantSubject, allow, require
from registry.wire import (
    GRANT_HEADER,
    WIRE_VERSION,
    FormDescription,
    Heartbeat,
    HeartbeatReply,
    ReplicaRegistration,
    ReplicaWelcome,
    ResolveRequest,
    WireVersionMismatch,
    require_wire_version,
)

router = APIRouter(tags=["serving"], route_class=Route)
openai_router = APIRouter(tags=["openai"], route_class=Route)

_replica_key = allow("replica")
ReplicaKey = Annotated[Subject, Depends(_replica_key)]
Inference = Annotated[TenantSubject, Depends(require("inference"))]


def _signer(settings: SettingsDep) -> GrantSigner:
    return signer_for(settings.secret_key.get_secret_value())


SignerDep = Annotated[GrantSigner, Depends(_signer)]


async def _same_wire_version(request: Request) -> None:
    """Before the body is validated: fields that another version added must not read as mistakes of this one."""
    try:
        message = await request.json()
    except ValueError:
        return  # not JSON at all: the validation that follows says so
    try:
        require_wire_version(message)
    except WireVersionMismatch as error:
        raise Conflict(
            str(error), code="wire_version", field="wire_version", value=error.theirs, remedy=f"speak version {WIRE_VERSION}"
        ) from error


SAME_WIRE_VERSION = [Depends(_replica_key), Depends(_same_wire_version)]  # in this order: strangers learn nothing


@router.post("/replicas", dependencies=SAME_WIRE_VERSION, responses=problem_responses(Conflict, Forbidden, Invalid))
def register_replica(
    body: ReplicaRegistration, *, subject: ReplicaKey, session: WriteSessionDep, settings: SettingsDep, signer: SignerDep
) -> ReplicaWelcome:
    """Make a replica known, or known again. It is chosen for requests from its first heartbeat on."""
    return service.register(session, subject, body, signer=signer, settings=settings)


@router.post("/replicas/{replica_id}/heartbeat", dependencies=SAME_WIRE_VERSION, responses=problem_responses(Conflict, Forbidden, NotFound))
def heartbeat(
    replica_id: str, body: Heartbeat, *, subject: ReplicaKey, session: WriteSessionDep, settings: SettingsDep, signer: SignerDep
) -> HeartbeatReply:
    """Report state and residents; learn grant keys and what to drop. 404: register again."""
    return service.heartbeat(session, subject, body, replica_id=replica_id, signer=signer, settings=settings)


@router.get("/replicas", dependencies=[Depends(allow("admin"))], responses=problem_responses(BadRequest, Forbidden))
def list_replicas(*, session: ReadSessionDep, settings: SettingsDep, limit: Limit = 50, cursor: Cursor = None) -> Page[ReplicaOut]:
    rows = repository.list_replicas(session, cursor=cursor, limit=limit, ttl_s=settings.replica_ttl_s)
    return make_page(rows, limit=limit, key=lambda row: (row[0].registered_at, row[0].id), show=_replica_out)


@router.get(
    "/replicas/{replica_id}/state", dependencies=[Depends(allow("admin"))], responses=problem_responses(Forbidden, NotFound, Unavailable)
)
async def replica_state(replica_id: str, request: Request) -> dict[str, Any]:
    """What the replica is doing now, as it says itself: pool map, slots, adapters by tier, queues, mode."""
    return await inspection.state_of(FrontDoor.of(request), replica_id)


@router.post("/resolve", dependencies=SAME_WIRE_VERSION, responses=problem_responses(Conflict, Forbidden, NotFound))
def resolve(
    body: ResolveRequest, *, subject: ReplicaKey, session: ReadSessionDep, settings: SettingsDep, signer: SignerDep
) -> FormDescription:
    """What a form consists of, for a replica that holds a live grant for it."""
    claims = signer.read(body.grant, leeway_s=settings.grant_leeway_s)
    return service.resolve(session, subject, body, claims=claims)


@router.get("/pull/{sha256}", response_class=StreamingResponse, responses=problem_responses(BadRequest, Forbidden, NotFound))
def pull(
    sha256: Sha256Path,
    *,
    subject: ReplicaKey,
    database: DatabaseDep,
    settings: SettingsDep,
    signer: SignerDep,
    store: BlobStoreDep,
    grant: Annotated[str, Header(alias=GRANT_HEADER, max_length=4096)],
    byte_range: Annotated[str | None, Header(alias="Range", max_length=64)] = None,
) -> Response:
    """One blob of a form, for a replica that holds a live grant for it. `ETag` is the sha256; `Range` resumes."""
    claims = signer.read(grant, leeway_s=settings.grant_leeway_s)
    with database.read() as session:  # over before the store is asked
        service.may_pull(session, subject, sha256, claims=claims)
        blob = blobs.get(session, claims.tenant, sha256)
    return blob_response(store, blob, byte_range=byte_range)


def _replica_out(row: Any) -> ReplicaOut:
    replica, base_model, live, num_residents = row
    return ReplicaOut(
        id=replica.id,
        url=replica.url,
        base_model=base_model,
        state=replica.state,
        live=live,
        max_rank=replica.max_rank,
        num_pages=replica.num_pages,
        page_bytes=replica.page_bytes,
        num_queued=replica.num_queued,
        num_running=replica.num_running,
        num_free_pages=replica.num_free_pages,
        num_residents=num_residents,
        registered_at=replica.registered_at,
        heartbeat_at=replica.heartbeat_at,
    )


# ---- OpenAI ----

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {"model": {"type": "string", "description": "A base model, or adapter, adapter@3, adapter@alias."}},
                }
            }
        },
    }
}
_OPENAI_ERRORS = problem_responses(BadRequest, Forbidden, NotFound, RateLimited, Unavailable)


@openai_router.post("/completions", responses=_OPENAI_ERRORS, openapi_extra=_BODY)
async def completions(request: Request, subject: Inference) -> Response:
    """OpenAI's completions, by a replica of the base model."""
    return await FrontDoor.of(request).relay(request, subject, path="/v1/completions")


@openai_router.post("/chat/completions", responses=_OPENAI_ERRORS, openapi_extra=_BODY)
async def chat_completions(request: Request, subject: Inference) -> Response:
    """OpenAI's chat completions, by a replica of the base model."""
    return await FrontDoor.of(request).relay(request, subject, path="/v1/chat/completions")


@openai_router.get("/models")
def list_models(subject: Inference, session: ReadSessionDep) -> ModelList:
    """Every base model, and the tenant's adapters that are ready under their bare name."""
    return ModelList(data=[_card(served, subject=subject) for served in service.list_models(session, subject)])


@openai_router.get("/models/{model:path}", responses=problem_responses(Forbidden, NotFound))
def get_model(model: str, subject: Inference, session: ReadSessionDep) -> ModelCard:
    """One model by any reference that a completion would take."""
    return _card(service.authorise(session, subject, model).served, subject=subject, reference=model)


def _card(served: Served, *, subject: TenantSubject, reference: str | None = None) -> ModelCard:
    created = int(served.created_at.timestamp())
    if served.name is None or served.version_digest is None:
        return ModelCard(id=served.base_model, created=created, owned_by="lorary", root=served.base_model)
    name = reference or served.name
    return ModelCard(id=name, created=created, owned_by=subject.tenant, root=served.version_digest, parent=served.base_model)
