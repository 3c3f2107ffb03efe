"""Reading, listing and deleting adapters and versions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fastapi import FastAPI
from sqlalchemy import event

from registry.db import Database
from tests.registry.adapters.pushing import Pusher, adapter

Work = Callable[[], int]


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """The SELECTs that the application sends meanwhile."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            sent.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


class TestListing:
    def test_number_of_statements_does_not_grow(self, acme: Pusher, app: FastAPI, work: Work) -> None:
        counts = []
        for size in (1, 6):
            for index in range(size):
                acme.push(f"a{size}-{index}", adapter())
            work()
            with statements(app.state.database) as sent:
                assert len(acme.get("/adapters")["items"]) >= size
            counts.append(len(sent))
        assert counts[0] == counts[1]
        assert counts[1] <= 4, "authentication, page, versions, aliases"

    def test_number_of_statements_of_versions_does_not_grow(self, acme: Pusher, app: FastAPI, work: Work) -> None:
        counts = []
        for number in range(1, 6):
            acme.push("pirate", adapter(number))
            work()
            with statements(app.state.database) as sent:
                assert len(acme.get("/adapters/pirate/versions")["items"]) == number
            counts.append(len(sent))
        assert len(set(counts)) == 1
        assert counts[0] <= 4, "authentication, adapter, page, forms"

    def test_pages_hold_every_adapter_once_while_others_arrive(self, acme: Pusher) -> None:
        for index in range(5):
            acme.push(f"a{index}", adapter())
        first = acme.get("/adapters", params={"limit": 2})
        acme.push("late", adapter())
        names, cursor = [item["name"] for item in first["items"]], first["next_cursor"]
        while cursor:
            page = acme.get("/adapters", params={"limit": 2, "cursor": cursor})
            names += [item["name"] for item in page["items"]]
            cursor = page["next_cursor"]
        assert names == ["a4", "a3", "a2", "a1", "a0"]

    def test_versions_come_highest_first_in_pages(self, acme: Pusher) -> None:
        for seed in range(5):
            acme.push("pirate", adapter(seed))
        numbers, cursor = [], None
        while True:
            params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            page = acme.get("/adapters/pirate/versions", params=params)
            numbers += [item["number"] for item in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert numbers == [5, 4, 3, 2, 1]

    @pytest.mark.parametrize("path", ["/adapters", "/adapters/pirate/versions", "/adapters/pirate/aliases/default/history"])
    def test_a_foreign_cursor_is_refused(self, acme: Pusher, path: str) -> None:
        acme.push("pirate", adapter())
        response = acme.call("GET", path, params={"cursor": "nonsense"})
        assert (response.status_code, response.json()["field"]) == (400, "cursor")


class TestFiles:
    def test_come_back_byte_for_byte(self, acme: Pusher) -> None:
        files = adapter().files | {"README.md": b"# Arr\n"}
        acme.push("pirate", files)
        for path, data in files.items():
            response = acme.call("GET", f"/adapters/pirate/versions/1/files/{path}")
            assert (response.status_code, response.content) == (200, data)
            assert response.headers["content-length"] == str(len(data))

    def test_a_range_is_served(self, acme: Pusher) -> None:
        files = adapter().files
        acme.push("pirate", files)
        url = "/adapters/pirate/versions/1/files/adapter_model.safetensors"
        response = acme.call("GET", url, headers={"Range": "bytes=8-15"})
        assert (response.status_code, response.content) == (206, files["adapter_model.safetensors"][8:16])

    @pytest.mark.parametrize("path", ["absent.txt", "../../../etc/passwd", "%2e%2e%2fsecret.key"])
    def test_nothing_else_is_there(self, acme: Pusher, path: str) -> None:
        acme.push("pirate", adapter())
        assert acme.call("GET", f"/adapters/pirate/versions/1/files/{path}").status_code == 404


class TestDeletion:
    def test_of_a_version_takes_its_aliases_along(self, acme: Pusher, work: Work) -> None:
        acme.push("pirate", adapter(1))
        acme.push("pirate", adapter(2))
        work()
        acme.put_alias("pirate", "prod", 2, **{"If-None-Match": "*"})
        assert acme.call("DELETE", "/adapters/pirate/versions/1").status_code == 204
        assert acme.call("GET", "/adapters/pirate/versions/1").status_code == 404
        assert acme.get("/adapters/pirate")["aliases"] == {"prod": 2}
        assert acme.get("/adapters/pirate")["num_versions"] == 1
        assert acme.call("DELETE", "/adapters/pirate/versions/1").status_code == 404
        moves = acme.get("/adapters/pirate/aliases/default/history")["items"]
        assert [(move["generation"], move["version"]) for move in moves] == [(2, None), (1, 1)]

    def test_of_a_version_is_undone_by_pushing_its_bytes(self, acme: Pusher, work: Work) -> None:
        first = acme.push("pirate", adapter(1)).json()
        work()
        acme.call("DELETE", "/adapters/pirate/versions/1")
        again = acme.push("pirate", adapter(1))
        assert again.status_code == 200
        assert (again.json()["number"], again.json()["status"]) == (1, "ready")
        assert again.json()["version_digest"] == first["version_digest"]
        assert acme.get("/adapters/pirate")["aliases"] == {"default": 1}
        assert work() == 0

    def test_of_a_pending_version_wins_over_its_job(self, acme: Pusher, work: Work) -> None:
        acme.push("pirate", adapter(1))
        acme.call("DELETE", "/adapters/pirate/versions/1")
        assert work() == 1
        assert acme.call("GET", "/adapters/pirate/versions/1").status_code == 404
        assert acme.get("/adapters/pirate")["aliases"] == {}
        again = acme.push("pirate", adapter(1)).json()
        assert (again["number"], again["status"]) == (1, "pending")
        work()
        assert acme.get("/adapters/pirate/versions/1")["status"] == "ready"

    def test_of_an_adapter_frees_no_version_number(self, acme: Pusher, work: Work) -> None:
        acme.push("pirate", adapter(1))
        acme.push("pirate", adapter(2))
        work()
        assert acme.call("DELETE", "/adapters/pirate").status_code == 204
        assert acme.call("GET", "/adapters/pirate").status_code == 404
        assert acme.call("GET", "/adapters/pirate/versions/1").status_code == 404
        assert acme.get("/adapters")["items"] == []
        assert acme.call("DELETE", "/adapters/pirate").status_code == 404
        assert acme.push("pirate", adapter(3)).json()["number"] == 3
        work()
        assert acme.get("/adapters/pirate")["aliases"] == {"default": 3}
        assert [item["number"] for item in acme.get("/adapters/pirate/versions")["items"]] == [3], "1 and 2 stay deleted"
        assert acme.push("pirate", adapter(2)).json()["number"] == 2


class TestPatch:
    def test_changes_what_is_named(self, acme: Pusher) -> None:
        acme.push("pirate", adapter(), description="old", tags=["a"])
        before = acme.get("/adapters/pirate")
        response = acme.call("PATCH", "/adapters/pirate", json={"description": "new"})
        assert (response.status_code, response.json()["description"], response.json()["tags"]) == (200, "new", ["a"])
        after, earlier = (dt.datetime.fromisoformat(shown["updated_at"]) for shown in (response.json(), before))
        assert after >= earlier
        assert acme.get("/adapters/pirate")["description"] == "new"

    def test_refuses_what_it_does_not_know(self, acme: Pusher) -> None:
        acme.push("pirate", adapter())
        assert acme.call("PATCH", "/adapters/pirate", json={"name": "x"}).status_code == 422
