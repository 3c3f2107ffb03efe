"""`/quota` for tenants, `/tenants/{name}/quota` for operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Forbidden, Invalid, NotFound, problem_responses
from registry.quotas import service
from registry.quotas.schemas import QuotaOut, QuotaPatch
from registry.quotas.service import Limits
from registry.routing import Route
from registry.tenants import service as tenants
from registry.tenants.auth import Subject, TenantSubject, allow, require
from registry.tenants.keys import ADMIN

router = APIRouter(tags=["quotas"], route_class=Route)

Admin = Annotated[Subject, Depends(allow(ADMIN))]
Reader = Annotated[TenantSubject, Depends(require("usage:read"))]


def _defaults(request: Request) -> Limits:
    return service.defaults_of(request.app.state.settings)


DefaultsDep = Annotated[Limits, Depends(_defaults)]


@router.get("/quota", responses=problem_responses(BadRequest, Forbidden))
def get_quota(subject: Reader, session: ReadSessionDep, defaults: DefaultsDep) -> QuotaOut:
    """What this tenant may use, and what it uses."""
    subject.must_be_unlimited("the quota")
    return service.describe(session, subject.tenant, subject.tenant_id, defaults=defaults)


@router.get("/tenants/{name}/quota", responses=problem_responses(NotFound), dependencies=[Depends(allow(ADMIN))])
def get_tenant_quota(name: str, session: ReadSessionDep, defaults: DefaultsDep) -> QuotaOut:
    tenant = tenants.get_tenant(session, name)
    return service.describe(session, tenant.name, tenant.id, defaults=defaults)


@router.patch("/tenants/{name}/quota", responses=problem_responses(Forbidden, NotFound, Invalid))
def patch_tenant_quota(name: str, patch: QuotaPatch, *, subject: Admin, session: WriteSessionDep, defaults: DefaultsDep) -> QuotaOut:
    """Set limits; they hold for what begins from now on. What the tenant has beyond a smaller limit stays."""
    tenant = tenants.get_tenant(session, name)
    service.change(session, subject, tenant, patch)
    return service.describe(session, tenant.name, tenant.id, defaults=defaults)
