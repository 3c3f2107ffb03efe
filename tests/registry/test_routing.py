"""Units of work of requests: settled in the endpoint's own thread, before the answer, or undone; also on a router that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from registry.db import Database, WriteSessionDep
from registry.errors import Conflict
from registry.routing import Route
from registry.tenants import repository
from registry.tenants.models import Tenant

pytestmark = pytest.mark.sqlite
ROUTERS = {"ours": lambda: APIRouter(route_class=Route), "plain": APIRouter}


@pytest.fixture(params=list(ROUTERS))
def probe(request: pytest.FixtureRequest, app: FastAPI) -> str:
    """Path of an endpoint that writes a row, and then does what `?then=` says."""
    router = ROUTERS[request.param]()

    @router.post("/api/v1/probe/{name}")
    def write(name: str, then: str, session: WriteSessionDep) -> dict[str, str]:
        session.add(Tenant(id=uuid4().hex, name=name))
        if then == "refuse":
            raise Conflict("the probe refuses")
        if then == "break":
            raise ZeroDivisionError("the probe breaks")
        return {"name": name}

    app.include_router(router)
    return "/api/v1/probe"


@pytest.fixture
def is_there(database: Database) -> Callable[[str], bool]:
    def look(name: str) -> bool:
        with database.system_read() as session:
            return repository.tenant_by_name(session, name) is not None

    return look


def test_a_unit_of_work_is_settled_or_undone(client: TestClient, app: FastAPI, probe: str, is_there: Callable[[str], bool]) -> None:
    for then, status, written in (("return", 200, True), ("refuse", 409, False), ("break", 500, False)):
        assert client.post(f"{probe}/{then}-it?then={then}").status_code == status
        assert is_there(f"{then}-it") is written
    assert client.post(f"{probe}/return-it?then=return").status_code == 409, "the same name again: found when it is committed"
    assert client.post(f"{probe}/no-query").status_code == 422
    pool = app.state.database.engine.pool
    assert pool.checkedout() == 0, "a connection was not given back"


def test_every_endpoint_of_ours_runs_in_one_thread(app: FastAPI) -> None:
    from registry import app as application

    names = [name for name in vars(application) if hasattr(vars(application)[name], "router")]
    routes = [(name, route) for name in names if name != "health" for route in vars(application)[name].router.routes]
    assert routes
    assert [f"{name}: {route.path}" for name, route in routes if not isinstance(route, Route)] == []
