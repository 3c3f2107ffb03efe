"""`/signing-keys` and `/signing-policy`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, problem_responses
from registry.routing import Route
from registry.signing import repository, service
from registry.signing.schemas import PolicyIn, PolicyOut, SigningKeyIn, SigningKeyName, SigningKeyOut
from registry.tenants.auth import TenantSubject, require

router = APIRouter(tags=["signing"], route_class=Route)

Reader = Annotated[TenantSubject, Depends(require("adapters:read"))]
Writer = Annotated[TenantSubject, Depends(require("signing:write"))]


@router.get("/signing-keys", responses=problem_responses(BadRequest, Forbidden))
def list_signing_keys(subject: Reader, session: ReadSessionDep) -> list[SigningKeyOut]:
    """The tenant's keys by name, revoked ones too."""
    return [SigningKeyOut.model_validate(key) for key in repository.list_keys(session, subject.tenant_id)]


@router.post("/signing-keys", status_code=201, responses=problem_responses(BadRequest, Forbidden, Invalid, Conflict))
def add_signing_key(wanted: SigningKeyIn, *, subject: Writer, session: WriteSessionDep) -> SigningKeyOut:
    """Trust a public key. To rotate: add the next one, sign with it, revoke this one."""
    return SigningKeyOut.model_validate(service.add_key(session, subject, wanted))


@router.delete("/signing-keys/{name}", status_code=204, responses=problem_responses(BadRequest, Forbidden, Invalid, NotFound))
def revoke_signing_key(name: SigningKeyName, *, subject: Writer, session: WriteSessionDep) -> None:
    """Revoke, for good: its signatures are no longer taken, and what it vouched for shows it. The row stays."""
    service.revoke_key(session, subject, name)


@router.get("/signing-policy", responses=problem_responses(BadRequest, Forbidden))
def get_signing_policy(subject: Reader, session: ReadSessionDep) -> PolicyOut:
    return service.policy_of(session, subject.tenant_id)


@router.put("/signing-policy", responses=problem_responses(BadRequest, Forbidden, Invalid, Conflict))
def put_signing_policy(wanted: PolicyIn, *, subject: Writer, session: WriteSessionDep) -> PolicyOut:
    """What pushes must show from now on. `floor` with an admin key, the tenant named in X-Lorary-Tenant."""
    return service.set_policy(session, subject, wanted)
