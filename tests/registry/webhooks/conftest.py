"""A registry that lets tenants call loopback, and a deliverer that runs when a test says so."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from registry.config import Settings
from registry.db import Database, database_time
from registry.webhooks.models import WebhookDelivery
from tests.registry.adapters.conftest import acme, base_model, globex, operator, work, worker
from tests.registry.conftest import MakeTenant, bearer
from tests.registry.webhooks.receiving import Receiver, receiver
from workers.webhooks import Deliverer, build_deliverer

__all__ = ["acme", "base_model", "globex", "operator", "work", "worker"]

Hook = dict[str, Any]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Those of every test, and an operator who allows loopback."""
    return settings.model_copy(update={"outbound_allow_http": True, "outbound_allow_hosts": ("127.0.0.1",), "webhook_poll_s": 0.05})


@pytest.fixture
def deliverer(settings: Settings, database: Database) -> Deliverer:
    return build_deliverer(settings, database)


@pytest.fixture
def deliver(deliverer: Deliverer) -> Callable[[], int]:
    """Makes one attempt at every delivery that is due; returns how many there were."""

    def run() -> int:
        count = 0
        while deliverer.run_one():
            count += 1
        return count

    return run


@pytest.fixture
def ears() -> Iterator[Receiver]:
    with receiver() as here:
        yield here


@pytest.fixture
def token(make_tenant: MakeTenant) -> str:
    return make_tenant("hooked")


@pytest.fixture
def hook(client: TestClient, token: str, ears: Receiver) -> Hook:
    """A webhook of tenant `hooked` for every event; the receiver knows its secret."""
    return subscribe(client, token, ears)


def subscribe(client: TestClient, token: str, ears: Receiver, *event_types: str) -> Hook:
    body = {"url": ears.url, "event_types": list(event_types) or ["*"]}
    response = client.post("/api/v1/webhooks", json=body, headers=bearer(token))
    assert response.status_code == 201, response.text
    made: Hook = response.json()
    ears.secret = made["secret"]
    return made


@pytest.fixture
def happen(client: TestClient, token: str) -> Callable[[], None]:
    """Something that is an event: `key.created`."""

    def run() -> None:
        assert client.post("/api/v1/keys", json={"name": "k", "scopes": ["inference"]}, headers=bearer(token)).status_code == 201

    return run


@pytest.fixture
def log_of(client: TestClient, token: str, hook: Hook) -> Callable[[], list[Hook]]:
    def run() -> list[Hook]:
        items: list[Hook] = client.get(f"/api/v1/webhooks/{hook['id']}/deliveries", headers=bearer(token)).json()["items"]
        return items

    return run


@pytest.fixture
def later(database: Database) -> Callable[[float], None]:
    """later(seconds): what waits, waits that much less."""

    def run(seconds: float) -> None:
        with database.system_write() as session:
            past = database_time(session) - dt.timedelta(seconds=1)
            assert seconds > 0
            session.execute(update(WebhookDelivery).values(available_at=past))
            session.execute(update(WebhookDelivery).where(WebhookDelivery.lease_expires_at.is_not(None)).values(lease_expires_at=past))

    return run
