"""How many SQL statements the hot operations cost does not depend on how much there is: no N+1, whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import insert
from starlette.testclient import TestClient

from registry.adapters.models import READY, Adapter, AdapterVersion, Alias, Form
from registry.base_models.models import BaseModelRevision
from registry.db import Database
from registry.tenants.models import Tenant
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import MakeKey, MakeTenant, bearer
from tests.registry.statements import recorded

pytestmark = pytest.mark.postgresql


def fill(database: Database, tenant: str, *, adapters: int) -> None:
    """Ready adapters `made-00000` on, one version and the aliases `default` and `prod` each, written as rows."""
    with database.system_write() as session:
        tenant_id = session.query(Tenant.id).filter_by(name=tenant).scalar()
        base_id = session.query(BaseModelRevision.id).scalar()
        names = [f"{tenant}-{number:05d}" for number in range(adapters)]
        session.execute(insert(Adapter), [{"id": f"a-{n}", "tenant_id": tenant_id, "name": n, "base_model_id": base_id} for n in names])
        session.execute(insert(AdapterVersion), [_version(name, tenant_id=tenant_id, base_id=base_id) for name in names])
        session.execute(insert(Form), [_form(name, tenant_id=tenant_id) for name in names])
        session.execute(insert(Alias), [_alias(name, tenant_id=tenant_id, alias=a) for name in names for a in ("default", "prod")])


def _version(name: str, *, tenant_id: str, base_id: str) -> dict[str, Any]:
    content = {"version_digest": name.ljust(64, "0"), "manifest": {"files": []}, "targets": ["q_proj"], "num_params": 1, "size_bytes": 1}
    who = {"tenant_id": tenant_id, "adapter_id": f"a-{name}", "base_model_id": base_id, "created_by": "test"}
    return {"id": f"v-{name}", "number": 1, "status": READY, "rank": 8} | content | who


def _form(name: str, *, tenant_id: str) -> dict[str, Any]:
    content = {"kind": "raw", "form_digest": name.ljust(64, "f"), "manifest": {"blobs": {}}, "size_bytes": 1}
    return {"id": f"f-{name}", "tenant_id": tenant_id, "version_id": f"v-{name}"} | content


def _alias(name: str, *, tenant_id: str, alias: str) -> dict[str, Any]:
    where = {"tenant_id": tenant_id, "adapter_id": f"a-{name}", "version_id": f"v-{name}"}
    return {"id": f"{alias[0]}-{name}", "name": alias, "generation": 1, "updated_by": "test"} | where


def shape(statements: list[str]) -> list[str]:
    """Without how long IN lists are."""
    return [statement.partition(" IN (")[0] for statement in statements]


def cost(app: FastAPI, act: Callable[[], Any]) -> list[str]:
    with recorded(app) as statements:
        answer = act()
    assert answer.status_code in {200, 201}, answer.text
    return shape(statements)


def test_a_page_costs_the_same_statements_however_many_rows_it_has(app: FastAPI, acme: Pusher, database: Database) -> None:
    fill(database, "acme", adapters=400)
    few, many = (cost(app, lambda limit=limit: acme.call("GET", f"/adapters?limit={limit}")) for limit in (2, 400))
    assert few == many
    assert len(many) <= 5, many


@pytest.mark.full
def test_20_000_adapters_are_listed_in_a_constant_number_of_statements(app: FastAPI, acme: Pusher, database: Database) -> None:
    """Every page of the whole listing costs what a page of a tenant with one adapter costs."""
    acme.push("first", adapter())
    alone = cost(app, lambda: acme.call("GET", "/adapters?limit=500"))
    fill(database, "acme", adapters=20_000)
    cursor, seen = "", 0
    while cursor is not None:
        with recorded(app) as statements:
            page = acme.get(f"/adapters?limit=500{cursor and '&cursor=' + cursor}")
        assert len(statements) == len(alone), statements
        seen, cursor = seen + len(page["items"]), page["next_cursor"]
    assert seen == 20_001


def _resolve(client: TestClient, token: str, name: str) -> Any:
    return client.get(f"/v1/models/{name}@prod", headers=bearer(token))


Resolving = Callable[..., None]


@pytest.fixture
def resolving(app: FastAPI, client: TestClient, database: Database, make_tenant: MakeTenant, make_key: MakeKey) -> Resolving:
    """resolving(keys=, adapters=): whoever asks, for whichever adapter, costs one statement for the key and one for the name."""

    def check(*, keys: int, adapters: int) -> None:
        tenants = ["one", "two", "three", "four"]
        share = adapters // len(tenants)
        for tenant in tenants:
            make_tenant(tenant)
            fill(database, tenant, adapters=share)
        owners = [tenants[number % len(tenants)] for number in range(keys)]
        tokens = [make_key("inference", tenant=tenant) for tenant in owners]
        names = [f"{owners[n % keys]}-{(n // len(tenants)) % share:05d}" for n in range(adapters)]
        for number in (0, 1, adapters // 2, adapters - 1):
            statements = cost(app, lambda n=number: _resolve(client, tokens[n % keys], names[n]))
            assert len(statements) == 2, statements
        with recorded(app) as statements, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: _resolve(client, tokens[n % keys], names[n]), range(adapters)))
        assert {answer.status_code for answer in answers} == {200}
        assert [answer.json()["id"] for answer in answers] == [f"{name}@prod" for name in names]
        asked = [statement for statement in statements if statement.lstrip().startswith("SELECT")]
        assert len(asked) == 2 * adapters, "two statements a request, and nothing for company"

    return check


def test_many_keys_resolve_many_adapters_by_two_statements_each(resolving: Resolving, base_model: str) -> None:
    resolving(keys=8, adapters=80)


@pytest.mark.full
def test_1_000_keys_resolve_10_000_adapters_by_two_statements_each(resolving: Resolving, base_model: str) -> None:
    resolving(keys=1000, adapters=10_000)


def test_changes_cost_the_same_in_an_empty_tenant_and_in_a_full_one(
    app: FastAPI, acme: Pusher, database: Database, work: Callable[[], int]
) -> None:
    def change(name: str, seed: int) -> list[list[str]]:
        acme.push(name, adapter(seed))
        work()
        files = acme.upload(adapter(seed + 1).files)
        created = cost(app, lambda: acme.call("POST", f"/adapters/{name}/versions", json={"files": files}))
        work()
        acme.put_alias(name, "prod", 1, **{"If-None-Match": "*"})
        return [created, cost(app, lambda: acme.put_alias(name, "prod", 2, **{"If-Match": '"1"'}))]

    before = change("before", 1)
    fill(database, "acme", adapters=400)
    assert change("after", 11) == before


def test_a_push_is_two_statements_before_its_bytes_are_read_and_five_after(app: FastAPI, acme: Pusher, database: Database) -> None:
    acme.push("pushed", adapter(1))
    files = acme.upload(adapter(2).files)
    named = cost(app, lambda: acme.call("POST", "/adapters/pushed/versions", json={"files": files}))
    asked = [statement.split()[0] for statement in named if " api_keys" not in statement]
    together = ["WITH"] if database.dialect == "postgresql" else ["INSERT", "INSERT"]  # the job and its first event
    assert asked == ["SELECT", "SELECT", "SELECT", "INSERT", "INSERT", "INSERT", *together], named
