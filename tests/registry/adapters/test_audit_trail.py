"""Every state change leaves one record, by whom it was made."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select

from registry.audit.models import AuditEvent
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter

Work = Callable[[], int]


def trail(database: Database) -> list[str]:
    with database.read() as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.outcome == "done").order_by(AuditEvent.created_at, AuditEvent.id))
        kinds = ("adapter", "version", "alias", "base_model")
        return [event.action for event in events if event.resource_type in kinds]


def actions_after(database: Database, act: Callable[[], object]) -> list[str]:
    before = len(trail(database))
    act()
    return sorted(trail(database)[before:])


def test_life_of_an_adapter(acme: Pusher, database: Database, work: Work) -> None:
    def put(version: int, **headers: str) -> Callable[[], object]:
        return lambda: acme.put_alias("pirate", "prod", version, **headers)

    def call(method: str, path: str, **options: object) -> Callable[[], object]:
        return lambda: acme.call(method, path, **options)

    steps: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: acme.push("pirate", adapter(1)), ["adapter.created", "version.created"]),
        (work, ["alias.moved", "version.ready"]),
        (lambda: acme.push("pirate", adapter(1)), []),
        (lambda: acme.push("pirate", nan_adapter(2)), ["version.created"]),
        (work, ["version.rejected"]),
        (lambda: acme.push("pirate", nan_adapter(2)), ["version.revalidated"]),
        (work, ["version.rejected"]),
        (put(1, **{"If-None-Match": "*"}), ["alias.moved"]),
        (put(1, **{"If-None-Match": "*"}), []),
        (call("PATCH", "/adapters/pirate", json={"description": "x"}), ["adapter.updated"]),
        (call("PATCH", "/adapters/pirate", json={"description": "x"}), []),
        (call("DELETE", "/adapters/pirate/versions/2"), ["version.deleted"]),
        (call("DELETE", "/adapters/pirate"), ["adapter.deleted", "alias.moved", "alias.moved"]),
        (lambda: acme.push("pirate", adapter(1)), ["adapter.restored", "alias.moved", "version.ready"]),
    ]
    for number, (act, expected) in enumerate(steps):
        assert actions_after(database, act) == expected, f"step {number}"


def test_records_name_tenant_key_and_both_states(acme: Pusher, database: Database, work: Work) -> None:
    pushed = acme.push("pirate", adapter(1)).json()
    acme.push("pirate", adapter(2))
    work()
    acme.put_alias("pirate", "default", 2, **{"If-Match": '"1"'})
    with database.read() as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.action == "alias.moved").order_by(AuditEvent.created_at)).all()
    assert [event.key_id for event in events] == ["system", pushed["created_by"]]
    assert events[1].before == {"number": 1, "generation": 1}
    assert events[1].after == {"adapter": "pirate", "alias": "default", "number": 2, "generation": 2}
    assert len({event.tenant_id for event in events}) == 1
    assert events[0].tenant_id is not None


def test_what_is_refused_changes_nothing(acme: Pusher, database: Database, work: Work) -> None:
    acme.push("pirate", adapter(1))
    work()
    assert actions_after(database, lambda: acme.put_alias("pirate", "default", 1, **{"If-Match": '"9"'})) == []
    assert actions_after(database, lambda: acme.push("pirate", adapter(2).with_config(bias="all"))) == []
