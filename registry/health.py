"""`/livez` and `/readyz`: the first says that the process answers, the second that it can do its work."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

import migrations
from registry.blobs.store import BlobStore
from registry.db import Database, utc_now
from registry.errors import RegistryError

router = APIRouter(tags=["health"])


class Live(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """`checks` says `ok` or what is wrong, one line a part."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


@router.get("/livez")
def livez() -> Live:
    return Live()


@router.get("/readyz", responses={503: {"model": Ready}})
def readyz(request: Request) -> Response:
    checks = _check_database(request.app.state.database) | {"blob_store": _check_blob_store(request.app.state.blob_store)}
    good = all(said == "ok" for said in checks.values())
    ready = Ready(status="ok" if good else "unavailable", checks=checks)
    return JSONResponse(ready.model_dump(), status_code=200 if good else 503, headers={} if good else {"Retry-After": "2"})


def _check_database(database: Database) -> dict[str, str]:
    try:
        with database.read() as session:
            session.scalar(select(utc_now()))
            current = migrations.current_revision(session.connection())
    except SQLAlchemyError as error:
        return {"database": f"does not answer ({type(error).__name__})", "schema": "unknown"}
    if migrations.can_serve(current):
        return {"database": "ok", "schema": "ok"}
    needed = f"at {current}, this program needs {migrations.head_revision()}: run `lorary db upgrade`"
    return {"database": "ok", "schema": needed}


def _check_blob_store(store: BlobStore) -> str:
    try:
        store.check_writable()
    except (OSError, RegistryError) as error:
        return f"not writable: {error}"
    return "ok"
