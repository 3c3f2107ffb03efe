"""`/livez` and `/readyz`: the first says that the process answers, the second that it can do its work."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from registry.readiness import Readiness, Status

router = APIRouter(tags=["health"])


class Live(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """`checks` says `ok` or what is wrong, one line a part; `degraded` is ready still."""

    status: Status
    checks: dict[str, str]


@router.get("/livez")
async def livez() -> Live:
    """Needs nothing but this process: not even a thread, which requests may all hold while they wait for a database."""
    return Live()


@router.get("/readyz", responses={503: {"model": Ready}})
def readyz(request: Request) -> Response:
    readiness: Readiness = request.app.state.readiness
    report = readiness.report()
    ready = Ready(status=report.status, checks=report.checks)
    headers = {} if report.is_ready else {"Retry-After": "2"}
    return JSONResponse(ready.model_dump(), status_code=200 if report.is_ready else 503, headers=headers)
