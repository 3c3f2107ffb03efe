"""`/base-models`: operators register them, every key sees them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from registry.base_models import repository, service
from registry.base_models.models import BaseModelRevision
from registry.base_models.schemas import BaseModelAccepted, BaseModelIn, BaseModelOut
from registry.blobs.endpoints import SettingsDep
from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Conflict, Forbidden, Invalid, NotFound, problem_responses
from registry.pagination import Cursor, Limit, Page, make_page
from registry.routing import Route
from registry.tenants.auth import Subject, SubjectDep, allow
from registry.text import Name

router = APIRouter(prefix="/base-models", tags=["base models"], route_class=Route)

Admin = Annotated[Subject, Depends(allow("admin"))]
PathName = Annotated[Name, Path()]


@router.post("", status_code=202, responses=problem_responses(Forbidden, Invalid, Conflict))
def register_base_model(wanted: BaseModelIn, *, subject: Admin, session: WriteSessionDep, settings: SettingsDep) -> BaseModelAccepted:
    """Record the model; a job reads, converts or downloads it. Registering it again changes nothing, or retries a failed import."""
    revision, job = service.register(session, subject, wanted, settings=settings)
    return BaseModelAccepted(**_show(revision, subject).model_dump(), job_id=job.id if job else None)


@router.get("", responses=problem_responses(BadRequest, Invalid))
def list_base_models(*, subject: SubjectDep, session: ReadSessionDep, cursor: Cursor = None, limit: Limit = 50) -> Page[BaseModelOut]:
    rows = repository.page(session, cursor=cursor, limit=limit)
    return make_page(rows, limit=limit, key=lambda row: (row.created_at, row.id), show=lambda row: _show(row, subject))


@router.get("/{name}", responses=problem_responses(NotFound, Invalid))
def get_base_model(name: PathName, *, subject: SubjectDep, session: ReadSessionDep) -> BaseModelOut:
    return _show(service.get(session, name), subject)


@router.delete("/{name}", status_code=204, responses=problem_responses(Forbidden, NotFound, Invalid, Conflict))
def delete_base_model(name: PathName, *, subject: Admin, session: WriteSessionDep) -> None:
    """Refused while anything refers to it."""
    service.delete(session, subject, name)


def _show(revision: BaseModelRevision, subject: Subject) -> BaseModelOut:
    out = BaseModelOut.model_validate(revision, from_attributes=True)
    return out if subject.is_admin else out.model_copy(update={"source": None, "location": None, "reason": None})
