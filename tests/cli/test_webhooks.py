"""`lorary webhooks`, against a receiver that verifies signatures."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from registry.db import open_database
from tests.cli.conftest import Lorary, Registry
from tests.registry.webhooks.receiving import Receiver, receiver
from workers.webhooks import build_deliverer


@pytest.fixture
def ears(registry: Registry) -> Iterator[Receiver]:
    """A receiver, and a deliverer whose operator allows loopback."""
    allowed = {"outbound_allow_http": True, "outbound_allow_hosts": ("127.0.0.1",), "webhook_poll_s": 0.05}
    database, stop = open_database(registry.settings), threading.Event()
    deliverer = build_deliverer(registry.settings.model_copy(update=allowed), database)
    deliverer.start(stop)
    with receiver() as here:
        yield here
    stop.set()
    deliverer.join()
    database.close()


def test_a_webhook_from_creation_to_deletion(tenant: Lorary, ears: Receiver) -> None:
    refused = tenant("webhooks", "create", ears.url)
    assert refused.code == 1, "this registry's own policy is the strict one"
    assert "https" in refused.stderr
    made = tenant.ok("webhooks", "create", "https://receiver.example/hook", "--event", "key.created")
    assert made["secret"].startswith("whsec_")
    assert [row["id"] for row in tenant.ok("webhooks", "list")] == [made["id"]]
    assert "secret" not in tenant.ok("webhooks", "show", made["id"])
    rotated = tenant.ok("webhooks", "rotate", made["id"])
    assert rotated["secret"] != made["secret"]
    assert tenant("webhooks", "delete", made["id"]).code == 2
    assert tenant("webhooks", "delete", made["id"], "--yes").code == 0
    assert tenant.ok("webhooks", "list") == []


def test_ping_deliveries_and_replay(tenant: Lorary, registry: Registry, ears: Receiver) -> None:
    made = tenant.ok("webhooks", "create", "https://receiver.example/hook")
    _point(registry, made["id"], ears.url)
    ears.secret = made["secret"]
    pinged = tenant.ok("webhooks", "ping", made["id"])
    assert (pinged["state"], ears.types) == ("delivered", ["ping"])
    (row,) = tenant.ok("webhooks", "deliveries", made["id"])
    assert tenant("webhooks", "replay", made["id"], row["id"]).code == 0
    ears.answers = [500]
    failed = tenant("webhooks", "ping", made["id"])
    assert failed.code == 1
    assert "500" in failed.stderr


def _point(registry: Registry, webhook_id: str, url: str) -> None:
    """What the operator's policy refuses over HTTP is put into the row."""
    from registry.webhooks.models import WebhookEndpoint

    database = open_database(registry.settings)
    with database.system_write() as session:
        session.get_one(WebhookEndpoint, webhook_id).url = url
    database.close()
