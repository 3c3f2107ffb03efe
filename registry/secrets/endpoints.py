"""`/secrets`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, problem_responses
from registry.routing import Route
from registry.sealing import Sealer
from registry.secrets import repository, service
from registry.secrets.schemas import SecretIn, SecretName, SecretOut
from registry.tenants.auth import TenantSubject, require

router = APIRouter(prefix="/secrets", tags=["secrets"], route_class=Route)

Writer = Annotated[TenantSubject, Depends(require("secrets:write"))]


def _sealer(request: Request) -> Sealer:
    sealer: Sealer = request.app.state.sealer
    return sealer


SealerDep = Annotated[Sealer, Depends(_sealer)]


@router.get("", responses=problem_responses(BadRequest, Forbidden))
def list_secrets(subject: Writer, session: ReadSessionDep) -> list[SecretOut]:
    """Their names and when they were set, never their values."""
    return [SecretOut.model_validate(secret) for secret in repository.list_secrets(session, subject.tenant_id)]


@router.put(
    "/{name}",
    responses=problem_responses(BadRequest, Forbidden, Invalid, Conflict)
    | {201: {"description": "The secret is new.", "model": SecretOut}},
)
def put_secret(
    name: SecretName, body: SecretIn, *, response: Response, subject: Writer, session: WriteSessionDep, sealer: SealerDep
) -> SecretOut:
    """Set or replace. The value is encrypted at once and in no answer and no log."""
    secret, created = service.put(session, subject, name, value=body.value.get_secret_value(), sealer=sealer)
    response.status_code = 201 if created else 200
    return SecretOut.model_validate(secret)


@router.delete("/{name}", status_code=204, responses=problem_responses(BadRequest, Forbidden, Invalid, NotFound))
def delete_secret(name: SecretName, subject: Writer, session: WriteSessionDep) -> None:
    service.delete(session, subject, name)
