"""Aliases: compare-and-swap, history, only ready versions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.registry.adapters.pushing import Pusher, adapter

Work = Callable[[], int]
NEW = {"If-None-Match": "*"}


@pytest.fixture
def pirate(acme: Pusher, work: Work) -> Pusher:
    """`pirate` with three ready versions; `default` is 1."""
    for seed in range(3):
        acme.push("pirate", adapter(seed))
    work()
    return acme


def test_moves_by_etag(pirate: Pusher) -> None:
    created = pirate.put_alias("pirate", "prod", 1, **NEW)
    assert (created.status_code, created.headers["etag"]) == (201, '"1"')
    moved = pirate.put_alias("pirate", "prod", 2, **{"If-Match": '"1"'})
    assert (moved.status_code, moved.headers["etag"], moved.json()["version"]) == (200, '"2"', 2)
    lost = pirate.put_alias("pirate", "prod", 3, **{"If-Match": '"1"'})
    assert (lost.status_code, lost.json()["code"]) == (412, "precondition_failed")
    read = pirate.call("GET", "/adapters/pirate/aliases/prod")
    assert (read.headers["etag"], read.json()["version"]) == ('"2"', 2)


def test_needs_a_precondition(pirate: Pusher) -> None:
    response = pirate.put_alias("pirate", "prod", 1)
    assert (response.status_code, response.json()["code"]) == (428, "precondition_required")


def test_new_means_new(pirate: Pusher) -> None:
    assert pirate.put_alias("pirate", "default", 2, **NEW).status_code == 412
    assert pirate.put_alias("pirate", "prod", 2, **{"If-Match": '"1"'}).status_code == 412
    assert pirate.put_alias("pirate", "prod", 2, **{"If-Match": "*"}).status_code == 412
    assert pirate.put_alias("pirate", "default", 2, **{"If-Match": "*"}).status_code == 200


def test_preconditions_that_cannot_be_read(pirate: Pusher) -> None:
    for headers in [{"If-Match": "1"}, {"If-Match": 'W/"1"'}, {"If-Match": '"1"', "If-None-Match": "*"}]:
        assert pirate.put_alias("pirate", "default", 2, **headers).status_code == 400, headers


def test_only_ready_versions(pirate: Pusher) -> None:
    pirate.push("pirate", adapter(9))  # pending
    pending = pirate.put_alias("pirate", "prod", 4, **NEW)
    assert (pending.status_code, pending.json()["code"]) == (409, "version_not_ready")
    absent = pirate.put_alias("pirate", "prod", 77, **NEW)
    assert (absent.status_code, absent.json()["code"]) == (422, "version_unknown")
    pirate.call("DELETE", "/adapters/pirate/versions/2")
    assert pirate.put_alias("pirate", "prod", 2, **NEW).status_code == 422


def test_names_that_cannot_be(pirate: Pusher) -> None:
    for name in ["7", "007", "Prod", "-x", "a" * 64, "a b"]:
        assert pirate.put_alias("pirate", name, 1, **NEW).status_code == 422, name


def test_the_same_version_again_is_no_move(pirate: Pusher) -> None:
    response = pirate.put_alias("pirate", "default", 1, **{"If-Match": '"1"'})
    assert (response.status_code, response.headers["etag"]) == (200, '"1"')


def test_history_outlives_the_alias_and_old_etags_never_return(pirate: Pusher) -> None:
    pirate.put_alias("pirate", "prod", 1, **NEW)
    pirate.put_alias("pirate", "prod", 2, **{"If-Match": '"1"'})
    assert pirate.call("DELETE", "/adapters/pirate/aliases/prod", headers={"If-Match": '"1"'}).status_code == 412
    assert pirate.call("DELETE", "/adapters/pirate/aliases/prod", headers={"If-Match": '"2"'}).status_code == 204
    assert pirate.call("GET", "/adapters/pirate/aliases/prod").status_code == 404
    assert pirate.call("DELETE", "/adapters/pirate/aliases/prod").status_code == 404
    assert pirate.put_alias("pirate", "prod", 3, **NEW).headers["etag"] == '"4"'
    page = pirate.get("/adapters/pirate/aliases/prod/history", params={"limit": 3})
    rest = pirate.get("/adapters/pirate/aliases/prod/history", params={"cursor": page["next_cursor"]})
    moves = [(move["generation"], move["version"]) for move in page["items"] + rest["items"]]
    assert moves == [(4, 3), (3, None), (2, 2), (1, 1)]
    assert rest["next_cursor"] is None


def test_its_own_permission(pirate: Pusher, make_key: Callable[..., str]) -> None:
    writer = Pusher(pirate.client, {"Authorization": f"Bearer {make_key('adapters:read', 'adapters:write', tenant='acme')}"})
    assert writer.put_alias("pirate", "prod", 1, **NEW).status_code == 403
    assert writer.call("DELETE", "/adapters/pirate/aliases/default").status_code == 403


def test_of_many_movers_one_wins(pirate: Pusher) -> None:
    def move(version: int) -> int:
        return int(pirate.put_alias("pirate", "default", version, **{"If-Match": '"1"'}).status_code)

    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(move, [2, 3] * 4))
    assert sorted(codes) == [200] + [412] * 7
    moves = pirate.get("/adapters/pirate/aliases/default/history")["items"]
    assert [move["generation"] for move in moves] == [2, 1]


@pytest.mark.parametrize("version", [True, "1", 1.0])
def test_a_version_is_a_number(pirate: Pusher, version: object) -> None:
    refused = pirate.call("PUT", "/adapters/pirate/aliases/prod", json={"version": version}, headers=NEW)
    assert (refused.status_code, refused.json()["field"]) == (422, "body.version")


def test_a_bad_spelling_is_answered_with_a_sentence(pirate: Pusher) -> None:
    digits = pirate.put_alias("pirate", "2026", 1, **NEW)
    assert (digits.status_code, digits.json()["value"]) == (422, "2026")
    assert "not with digits alone" in digits.json()["detail"]
    named = pirate.call("GET", "/adapters/Pirate")
    assert (named.status_code, named.json()["value"]) == (422, "Pirate")
    assert "lower-case" in named.json()["detail"]
    assert "^" not in digits.json()["detail"] + named.json()["detail"], "an expression is no sentence"
