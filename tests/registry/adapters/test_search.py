"""Finding adapters by text, tags, base model, rank and status: what matches, on both databases alike, and at what cost."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, event, insert, text

from registry.adapters import listing
from registry.adapters.models import Adapter, AdapterTerm, AdapterVersion
from registry.adapters.search import Search, terms_of, words
from registry.audit.models import AuditEvent
from registry.config import Settings
from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter

Work = Callable[[], int]

ADAPTERS: list[tuple[str, Any, dict[str, Any]]] = [
    ("pirate-speak", adapter(1, rank=4), {"description": "Talks like a PIRATE, arr!", "tags": ["team:red", "draft"]}),
    ("legal.summary", adapter(2, rank=8), {"description": "Straße und Recht; 50% off_now", "tags": ["team:blue", "lang:de"]}),
    ("json_only", adapter(3, rank=16), {"description": "Piracy is not json", "tags": ["teammate", "lang:de-CH"]}),
    ("broken", nan_adapter(4), {"description": "日本語の海賊", "tags": []}),
]
EVERYTHING = ["broken", "json_only", "legal.summary", "pirate-speak"]

QUERIES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, EVERYTHING),
    ({"q": "pirate"}, ["pirate-speak"]),
    ({"q": "pira"}, ["json_only", "pirate-speak"]),
    ({"q": "PIRATE arr"}, ["pirate-speak"]),
    ({"q": "pirate-speak"}, ["pirate-speak"]),
    ({"q": "irate"}, []),
    ({"q": "pirate json"}, []),
    ({"q": "strasse"}, ["legal.summary"]),
    ({"q": "STRASSE recht"}, ["legal.summary"]),
    ({"q": "50%"}, ["legal.summary"]),
    ({"q": "日本"}, ["broken"]),
    ({"q": "red"}, ["pirate-speak"]),
    ({"q": "only"}, ["json_only"]),
    ({"tag": "team"}, ["legal.summary", "pirate-speak"]),
    ({"tag": "team:red"}, ["pirate-speak"]),
    ({"tag": "team:r"}, []),
    ({"tag": "lang:de"}, ["legal.summary"]),
    ({"tag": ["lang", "team"]}, ["legal.summary"]),
    ({"tag": "draft"}, ["pirate-speak"]),
    ({"tag": "Draft"}, []),
    ({"base_model": "tiny"}, EVERYTHING),
    ({"base_model": "huge"}, []),
    ({"status": "ready"}, ["json_only", "legal.summary", "pirate-speak"]),
    ({"status": "rejected"}, ["broken"]),
    ({"status": "pending"}, []),
    ({"min_rank": 8, "status": "ready"}, ["json_only", "legal.summary"]),
    ({"min_rank": 5, "max_rank": 15, "tag": "team"}, ["legal.summary"]),
    ({"max_rank": 4, "q": "arr", "tag": "team:red", "base_model": "tiny", "status": "ready"}, ["pirate-speak"]),
]


@pytest.fixture
def shelf(acme: Pusher, work: Work) -> Pusher:
    for name, files, body in ADAPTERS:
        assert acme.push(name, files, **body).status_code == 201
    work()
    return acme


def found(pusher: Pusher, **params: Any) -> list[str]:
    return sorted(item["name"] for item in pusher.get("/adapters", params=params)["items"])


@pytest.mark.postgresql
def test_what_matches(shelf: Pusher, globex: Pusher) -> None:
    for params, names in QUERIES:
        assert found(shelf, **params) == names, params
        assert found(globex, **params) == [], params


def test_the_index_follows_every_change(shelf: Pusher, work: Work) -> None:
    shelf.call("PATCH", "/adapters/json_only", json={"description": "corsair", "add_tags": ["sea", "sea"], "remove_tags": ["teammate"]})
    assert (found(shelf, q="corsair"), found(shelf, q="piracy"), found(shelf, tag="sea"), found(shelf, tag="teammate")) == (
        ["json_only"],
        [],
        ["json_only"],
        [],
    )
    assert shelf.get("/adapters/json_only")["tags"] == ["lang:de-CH", "sea"]
    shelf.push("json_only", adapter(5), tags=["land"])
    assert (found(shelf, tag="sea"), found(shelf, tag="land"), found(shelf, q="corsair")) == ([], ["json_only"], ["json_only"])
    shelf.call("DELETE", "/adapters/json_only")
    assert found(shelf, tag="land") == []
    shelf.push("json_only", adapter(5))
    assert found(shelf, tag="land") == ["json_only"]


def test_versions_that_are_gone_match_nothing(shelf: Pusher, work: Work) -> None:
    shelf.push("json_only", adapter(6, rank=2))
    work()
    assert found(shelf, max_rank=2) == ["json_only"]
    shelf.call("DELETE", "/adapters/json_only/versions/2")
    assert found(shelf, max_rank=2) == []


def test_a_description_changed_by_a_push_is_audited(shelf: Pusher, database: Database) -> None:
    shelf.push("json_only", adapter(3, rank=16), description="new words")
    with database.read() as session:
        (changed,) = session.query(AuditEvent).filter(AuditEvent.action == "adapter.updated").all()
    assert (changed.before, changed.after) == ({"description": "Piracy is not json"}, {"description": "new words"})


@pytest.mark.parametrize(
    "query", ["q=", "q=%21%3F", "q=" + "+".join(f"w{n}" for n in range(17)), "q=%00", "tag=", "min_rank=0", "status=gone", "max_rank=x"]
)
def test_searches_that_mean_nothing(acme: Pusher, query: str) -> None:
    assert acme.call("GET", f"/adapters?{query}").status_code == 422


@pytest.mark.parametrize("body", [{"tags": ["a"], "add_tags": ["b"]}, {"add_tags": [str(n) for n in range(32)]}, {"add_tags": [""]}])
def test_tags_that_do_not_fit(shelf: Pusher, body: dict[str, Any]) -> None:
    assert shelf.call("PATCH", "/adapters/json_only", json=body).status_code == 422


def test_pages_of_a_search_cover_it_once(shelf: Pusher) -> None:
    seen, cursor = [], None
    while True:
        params = {"q": "pira", "limit": 1} | ({"cursor": cursor} if cursor else {})
        page = shelf.get("/adapters", params=params)
        seen += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ["json_only", "pirate-speak"]


@given(st.text(max_size=80))
def test_words_find_the_text_that_they_come_from(said: str) -> None:
    assert words(said) == words(" ".join(words(said)))
    assert all(word.encode() < word.encode() + b"\xff" for word in words(said.encode("utf-8", "ignore").decode()))


# ---- many adapters ----


@pytest.fixture(params=[2_000, pytest.param(20_000, marks=pytest.mark.full)])
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def large(acme: Pusher, database: Database, settings: Settings, number: int) -> Pusher:
    """A tenant with so many adapters of one version each, written straight into the tables."""
    with database.write() as session:
        tenant_id, base_model_id = session.execute(text("SELECT t.id, b.id FROM tenants t, base_models b WHERE t.name = 'acme'")).one()
        start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        owned = {"tenant_id": tenant_id, "base_model_id": base_model_id}
        rows = [
            owned
            | {"id": f"{n:032x}", "name": f"adapter-{n}", "description": f"kind{n % 50}", "tags": [f"team:{n % 100}"]}
            | {"created_at": start + dt.timedelta(seconds=n), "updated_at": start}
            for n in range(number)
        ]
        session.execute(insert(Adapter), rows)
        content = {"manifest": {}, "targets": [], "num_params": 0, "size_bytes": 0, "created_by": "k", "created_at": start, "number": 1}
        versions = [
            owned | content | {"id": row["id"], "adapter_id": row["id"], "version_digest": row["id"], "status": "ready", "rank": n % 64 + 1}
            for n, row in enumerate(rows)
        ]
        session.execute(insert(AdapterVersion), versions)
        made = ((row["id"], terms_of(Adapter(name=row["name"], description=row["description"], tags=row["tags"]))) for row in rows)
        session.execute(
            insert(AdapterTerm),
            [{"tenant_id": tenant_id, "adapter_id": adapter_id, "term": term} for adapter_id, terms in made for term in terms],
        )
    owner = create_engine(settings.resolved_owner_url)  # who alone may; in production autovacuum does it
    with owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    owner.dispose()
    return acme


def statements_of(pusher: Pusher, **params: Any) -> tuple[int, list[dict[str, Any]]]:
    """How many statements a listing took, and what it showed."""
    seen: list[str] = []
    engine = pusher.client.app.state.database.engine  # type: ignore[attr-defined]

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith("SELECT") and "set_config" not in statement:
            seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        items = pusher.get("/adapters", params=params)["items"]
        return len(seen), items
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_large_tenant_costs_a_constant_number_of_statements_and_no_scan(large: Pusher, database: Database, number: int) -> None:
    searches: list[tuple[dict[str, Any], int]] = [
        ({}, number),
        ({"q": "kind7"}, number // 50),
        ({"q": "kind7", "tag": "team:7"}, number // 100),
        ({"tag": "team", "min_rank": 64}, number // 64),
        ({"status": "ready", "base_model": "tiny", "q": "adapter"}, number),
    ]
    for params, matches in searches:
        counts = set()
        for limit in (1, 500):
            num_statements, items = statements_of(large, limit=limit, **params)
            counts.add(num_statements)
            assert len(items) == min(limit, matches), params
        assert len(counts) == 1, params
        assert 0 < counts.pop() < 8, params
        if database.dialect == "sqlite":
            assert _scanned(database, params) == [], params


def _scanned(database: Database, params: dict[str, Any]) -> list[str]:
    """What SQLite would read whole to answer the page."""
    asked = {"text": params.get("q"), "tags": (params["tag"],) if "tag" in params else ()}
    search = Search(**asked, **{name: value for name, value in params.items() if name not in {"q", "tag"}})
    plans: list[str] = []

    def explain(connection: Any, _cursor: object, statement: str, parameters: Any, *_rest: object) -> None:
        if "FROM adapters" in statement and not statement.startswith("EXPLAIN"):
            rows = connection.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans.extend(row[3] for row in rows)

    event.listen(database.engine, "before_cursor_execute", explain)
    with database.read() as session:
        tenant_id = session.scalar(text("SELECT id FROM tenants WHERE name = 'acme'"))
        listing.page(session, tenant_id, search=search, cursor=None, limit=50)
    event.remove(database.engine, "before_cursor_execute", explain)
    assert plans, "the page was not explained"
    return [step for step in plans if step.startswith("SCAN") and "base_models" not in step]  # of those there is a handful
