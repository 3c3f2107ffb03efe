"""Soft delete, restore, purge: what was deleted comes back whole until it is purged, and then only by its bytes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from registry.blobs.models import BlobReference
from registry.config import Settings
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter

Work = Callable[[], int]


@pytest.fixture
def pirate(acme: Pusher, work: Work) -> Pusher:
    """An adapter with versions 1 (default), 2 (prod) and 3, ready."""
    for seed in (1, 2, 3):
        acme.push("pirate", adapter(seed))
    work()
    acme.put_alias("pirate", "prod", 2, **{"If-None-Match": "*"})
    return acme


def num_references(database: Database) -> int:
    with database.system_read() as session:
        return len(session.scalars(select(BlobReference.sha256)).all())


@pytest.mark.postgresql
def test_a_version_comes_back_with_its_aliases(pirate: Pusher, work: Work) -> None:
    before = pirate.get("/adapters/pirate/versions/2")
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    assert pirate.get("/adapters/pirate")["aliases"] == {"default": 1}
    back = pirate.call("POST", "/adapters/pirate/versions/2/restore")
    assert (back.status_code, back.json()["status"], back.json()["job_id"]) == (200, "ready", None)
    assert pirate.get("/adapters/pirate/versions/2") == before
    assert pirate.get("/adapters/pirate")["aliases"] == {"default": 1, "prod": 2}
    assert work() == 0
    again = pirate.call("POST", "/adapters/pirate/versions/2/restore")
    assert (again.status_code, again.json()["job_id"]) == (200, None)


def test_an_alias_that_moved_on_stays_where_it_is(pirate: Pusher) -> None:
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    pirate.put_alias("pirate", "prod", 3, **{"If-None-Match": "*"})
    pirate.call("POST", "/adapters/pirate/versions/2/restore")
    assert pirate.get("/adapters/pirate")["aliases"]["prod"] == 3


@pytest.mark.postgresql
def test_an_adapter_comes_back_with_what_its_deletion_took_along(pirate: Pusher) -> None:
    pirate.call("DELETE", "/adapters/pirate/versions/3")
    before = pirate.get("/adapters/pirate")
    pirate.call("DELETE", "/adapters/pirate")
    refused = pirate.call("POST", "/adapters/pirate/versions/1/restore")
    assert (refused.status_code, refused.json()["code"]) == (409, "adapter_deleted")
    back = pirate.call("POST", "/adapters/pirate/restore")
    assert back.status_code == 200
    for changed in ("updated_at",):
        before.pop(changed)
        assert back.json().pop(changed)
    assert {key: back.json()[key] for key in before} == before
    assert [item["number"] for item in pirate.get("/adapters/pirate/versions")["items"]] == [2, 1], "3 was deleted by itself"
    assert pirate.call("POST", "/adapters/pirate/versions/3/restore").json()["status"] == "ready"
    assert pirate.call("POST", "/adapters/pirate/restore").status_code == 200, "again: nothing to do"


@pytest.mark.postgresql
def test_lists_show_deleted_ones_with_their_times(pirate: Pusher, settings: Settings) -> None:
    pirate.call("DELETE", "/adapters/pirate/versions/3")
    assert [item["number"] for item in pirate.get("/adapters/pirate/versions")["items"]] == [2, 1]
    shown = pirate.get("/adapters/pirate/versions", params={"show_deleted": True})["items"]
    assert [(item["number"], item["status"]) for item in shown] == [(3, "deleted"), (2, "ready"), (1, "ready")]
    deleted_at, until = (dt.datetime.fromisoformat(shown[0][field]) for field in ("deleted_at", "restorable_until"))
    assert (until - deleted_at).total_seconds() == settings.deleted_retention_s
    assert shown[1]["deleted_at"] is shown[1]["restorable_until"] is None
    assert pirate.call("GET", "/adapters/pirate/versions/3").status_code == 404
    assert pirate.get("/adapters/pirate/versions/3", params={"show_deleted": True})["status"] == "deleted"
    pirate.call("DELETE", "/adapters/pirate")
    assert pirate.get("/adapters")["items"] == []
    assert pirate.call("GET", "/adapters/pirate").status_code == 404
    [item] = pirate.get("/adapters", params={"show_deleted": True})["items"]
    assert item == pirate.get("/adapters/pirate", params={"show_deleted": True})
    assert (item["num_versions"], item["aliases"]) == (0, {})
    assert item["restorable_until"] > item["deleted_at"]
    assert len(pirate.get("/adapters/pirate/versions", params={"show_deleted": True})["items"]) == 3


def test_a_version_that_never_was_ready_is_checked_again(acme: Pusher, work: Work) -> None:
    acme.push("broken", nan_adapter())
    work()
    acme.call("DELETE", "/adapters/broken/versions/1")
    back = acme.call("POST", "/adapters/broken/versions/1/restore").json()
    assert (back["status"], back["job_id"] is None) == ("pending", False)
    assert work() == 1
    assert acme.get("/adapters/broken/versions/1")["status"] == "rejected"


@pytest.mark.postgresql
def test_purged_is_final_but_for_the_same_bytes(pirate: Pusher, work: Work, database: Database) -> None:
    refused = pirate.call("POST", "/adapters/pirate/versions/2/purge")
    assert (refused.status_code, refused.json()["code"]) == (409, "version_not_deleted")
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    held = num_references(database)
    purged = pirate.call("POST", "/adapters/pirate/versions/2/purge")
    assert (purged.status_code, purged.json()["forms"], purged.json()["restorable_until"]) == (200, [], None)
    assert purged.json()["purged_at"]
    assert num_references(database) == held - 2
    assert pirate.call("POST", "/adapters/pirate/versions/2/purge").json() == purged.json()
    refused = pirate.call("POST", "/adapters/pirate/versions/2/restore")
    assert (refused.status_code, refused.json()["code"]) == (409, "purged")
    again = pirate.push("pirate", adapter(2)).json()
    assert (again["number"], again["status"], again["purged_at"]) == (2, "pending", None)
    work()
    assert pirate.get("/adapters/pirate/versions/2")["status"] == "ready"
    assert num_references(database) == held


def test_purging_an_adapter_takes_every_deleted_version(pirate: Pusher) -> None:
    pirate.call("DELETE", "/adapters/pirate/versions/3")
    assert pirate.call("POST", "/adapters/pirate/purge").json() == {"purged": [3]}
    pirate.call("DELETE", "/adapters/pirate")
    assert pirate.call("POST", "/adapters/pirate/purge").json() == {"purged": [1, 2]}
    refused = pirate.call("POST", "/adapters/pirate/restore")
    assert (refused.status_code, refused.json()["code"]) == (409, "purged")
    assert pirate.push("pirate", adapter(3)).json()["number"] == 3, "numbers never mean two things"


def test_every_step_is_audited(pirate: Pusher, operator: Pusher) -> None:
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    pirate.call("POST", "/adapters/pirate/versions/2/restore")
    pirate.call("DELETE", "/adapters/pirate/versions/3")
    pirate.call("POST", "/adapters/pirate/versions/3/purge")
    events = operator.get("/audit", params={"limit": 20}, headers={"X-Lorary-Tenant": "acme"})["items"]
    ready = next(event for event in events if event["action"] == "version.ready")
    assert ready["after"]["restored"] is True
    [purged] = [event for event in events if event["action"] == "version.purged"]
    assert purged["before"] == {"adapter": "pirate", "number": 3, "version_digest": purged["before"]["version_digest"]}


@pytest.mark.postgresql
def test_restore_and_delete_at_once_end_in_one_of_the_two(pirate: Pusher) -> None:
    def toggle(number: int) -> int:
        if number % 2:
            return int(pirate.call("DELETE", "/adapters/pirate/versions/2").status_code)
        return int(pirate.call("POST", "/adapters/pirate/versions/2/restore").status_code)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(toggle, range(16))) <= {200, 204, 404}
    shown = pirate.get("/adapters/pirate/versions/2", params={"show_deleted": True})
    aliases = pirate.get("/adapters/pirate")["aliases"]
    assert (shown["status"], "prod" in aliases) in {("ready", True), ("deleted", False)}
    assert (shown["deleted_at"] is None) == (shown["status"] == "ready")
