"""A key that is limited to some adapters, against every route: what lies outside looks like what never was.

Every operation of the OpenAPI document is called, also those that are not written yet: with the names and ids of an
adapter outside the limit, and with names and ids of nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from registry.tenants.keys import TENANT_SCOPES, key_id_of
from registry.tenants.limits import TENANT_WIDE_SCOPES
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import bearer

JSON = dict[str, Any]
Names = dict[str, str]
Work = Callable[[], int]
HIDDEN, ABSENT = "veiled", "absent"

# What a route needs to be asked something sensible; every other one is asked with {}.
BODIES: dict[str, JSON] = {
    "PATCH /api/v1/adapters/{name}": {"description": "mine now"},
    "PUT /api/v1/adapters/{name}/aliases/{alias}": {"version": 1},
    "POST /api/v1/adapters/{name}/versions": {"files": {"adapter_config.json": "0" * 64}},
    "POST /api/v1/imports": {"repo": "org/some", "name": "{name}"},
    "POST /v1/completions": {"model": "{name}", "prompt": "hello"},
    "POST /v1/chat/completions": {"model": "{name}", "messages": []},
}
REFUSED_BY_NAME = {"POST /api/v1/adapters/{name}/versions", "POST /api/v1/imports"}
# Bytes are the tenant's: whoever knows a sha256 has the bytes already, and no answer tells a limited key one of outside.
BY_DIGEST = {"GET /api/v1/blobs/{sha256}", "HEAD /api/v1/blobs/{sha256}"}


@pytest.fixture
def limited(acme: Pusher, work: Work) -> Pusher:
    """Of a tenant with the adapters `veiled` and `team-a.one`, a key that is limited to `team-`."""
    assert acme.push(HIDDEN, adapter(1)).status_code == 201
    assert acme.push("team-a.one", adapter(2)).status_code == 201
    work()
    wanted = {"name": "ci", "scopes": sorted(TENANT_SCOPES - TENANT_WIDE_SCOPES), "adapter_prefixes": ["team-"]}
    made = acme.call("POST", "/keys", json=wanted)
    assert made.status_code == 201, made.text
    return Pusher(acme.client, bearer(made.json()["token"]))


@pytest.fixture
def outside(acme: Pusher, limited: Pusher) -> tuple[Names, Names]:
    """What a path may name: of the adapter outside, and of nothing."""
    job_id = next(job["id"] for job in acme.get("/jobs")["items"] if job["adapter"] == HIDDEN)
    key_id = key_id_of(acme.headers["Authorization"].split()[1])
    sha256 = acme.get(f"/adapters/{HIDDEN}/versions/1")["files"][0]["sha256"]
    hidden = dict.fromkeys(("name", "adapter", "model"), HIDDEN) | {"job_id": job_id, "key_id": key_id, "sha256": sha256}
    absent = {name: ABSENT if value == HIDDEN else "0" * len(value) for name, value in hidden.items()}
    both = {"tenant": "acme", "number": "1", "alias": "default", "path": "adapter_config.json", "revision": "main"}
    return both | hidden, both | absent


def operations(pusher: Pusher) -> list[str]:
    paths = pusher.client.get("/openapi.json").json()["paths"]
    return sorted(f"{method.upper()} {path}" for path, methods in paths.items() for method in methods)


def ask(pusher: Pusher, operation: str, names: Names) -> Any:
    method, path = operation.split(" ", 1)
    content = json.loads(json.dumps(BODIES.get(operation, {})).replace("{name}", names["name"]))
    for name, value in names.items():
        if name != "name" or "/adapters/" in path:  # other things have names too
            path = path.replace("{" + name + "}", value)
    headers = pusher.headers | ({"If-Match": '"1"'} if method == "PUT" else {})
    body = {} if method in {"GET", "HEAD"} else {"json": content}
    return pusher.client.request(method, path.replace("{", "x").replace("}", ""), headers=headers, **body)


def visible(response: Any, names: Names) -> tuple[int, str]:
    text = response.text.replace(response.headers["x-request-id"], "*")
    for word in sorted((value for value in names.values() if len(value) > 4), key=len, reverse=True):
        text = text.replace(word, "*")
    return response.status_code, text


def test_no_route_tells_of_what_lies_outside(acme: Pusher, limited: Pusher, outside: tuple[Names, Names]) -> None:
    before = acme.get(f"/adapters/{HIDDEN}")
    hidden, absent = outside
    for operation in operations(limited):
        named = "{name}" in operation.partition("/adapters/")[2] or "{adapter}" in operation
        if operation in BY_DIGEST or not (named or "_id}" in operation or operation in BODIES or "{model}" in operation):
            continue
        got, ghost = ask(limited, operation, hidden), ask(limited, operation, absent)
        assert visible(got, hidden) == visible(ghost, absent), operation
        if named:
            assert got.status_code == (403 if operation in REFUSED_BY_NAME else 404), operation
        assert acme.get(f"/adapters/{HIDDEN}") == before, operation


def test_listings_leave_out_what_lies_outside(limited: Pusher, outside: tuple[Names, Names]) -> None:
    told = {HIDDEN, outside[0]["job_id"], outside[0]["sha256"]}
    for operation in operations(limited):
        method, path = operation.split(" ", 1)
        if method == "GET" and "{" not in path:
            text = limited.client.get(path, headers=limited.headers).text
            assert not [word for word in told if word in text], operation
    assert [item["name"] for item in limited.get("/adapters")["items"]] == ["team-a.one"]
    assert [job["adapter"] for job in limited.get("/jobs")["items"]] == ["team-a.one"]
    assert [key["adapter_prefixes"] for key in limited.get("/keys")["items"]] == [["team-"]]
    models = limited.client.get("/v1/models", headers=limited.headers).json()["data"]
    assert {model["id"] for model in models} == {"tiny", "team-a.one"}


@pytest.mark.postgresql
def test_inside_the_limit_everything_works(limited: Pusher, work: Work) -> None:
    assert limited.push("team-b", adapter(3)).status_code == 201
    assert work() == 1
    assert limited.get("/adapters/team-b/versions/1")["status"] == "ready"
    assert limited.put_alias("team-b", "prod", 1, **{"If-None-Match": "*"}).status_code == 201
    assert limited.client.get("/api/models/acme/team-b", headers=limited.headers).status_code == 200
    assert limited.client.get("/v1/models/team-b@prod", headers=limited.headers).status_code == 200
    assert [item["name"] for item in limited.get("/adapters")["items"]] == ["team-b", "team-a.one"]
    assert {job["adapter"] for job in limited.get("/jobs")["items"]} == {"team-b", "team-a.one"}
    assert limited.call("DELETE", "/adapters/team-b").status_code == 204
    assert limited.get("/whoami")["adapter_prefixes"] == ["team-"]


@pytest.mark.parametrize("prefixes", [["te"], ["other-"], ["team-a", "other-"], None])
def test_a_limited_key_makes_no_wider_one(limited: Pusher, prefixes: list[str] | None) -> None:
    wanted = {"name": "wider", "scopes": ["adapters:read"], "adapter_prefixes": prefixes}
    refused = limited.call("POST", "/keys", json=wanted)
    assert (refused.status_code, refused.json()["field"]) == (403, "adapter_prefixes")


def test_a_limited_key_makes_and_manages_narrower_ones(limited: Pusher) -> None:
    wanted = {"name": "narrower", "scopes": ["adapters:read"], "adapter_prefixes": ["team-a.", "team-b"]}
    made = limited.call("POST", "/keys", json=wanted).json()
    assert made["id"] in [key["id"] for key in limited.get("/keys", params={"limit": 1})["items"]]
    narrower = Pusher(limited.client, bearer(made["token"]))
    assert [item["name"] for item in narrower.get("/adapters")["items"]] == ["team-a.one"]
    assert limited.call("POST", f"/keys/{made['id']}/rotate", json={"overlap_s": 0}).status_code == 200
    assert narrower.call("GET", "/adapters").status_code == 401


@pytest.mark.parametrize("wanted", [{"scopes": ["webhooks:write"]}, {"prefixes": []}, {"prefixes": ["Team"]}, {"prefixes": ["a%"]}])
def test_limits_that_mean_nothing_are_refused(acme: Pusher, wanted: JSON) -> None:
    body = {"name": "k", "scopes": wanted.get("scopes", ["adapters:read"]), "adapter_prefixes": wanted.get("prefixes", ["team-"])}
    assert acme.call("POST", "/keys", json=body).status_code == 422


def test_an_underscore_is_no_wildcard(acme: Pusher) -> None:
    for name in ("a_b", "axb"):
        acme.push(name, adapter(1))
    made = acme.call("POST", "/keys", json={"name": "k", "scopes": ["adapters:read"], "adapter_prefixes": ["a_"]}).json()
    key = Pusher(acme.client, bearer(made["token"]))
    assert [item["name"] for item in key.get("/adapters")["items"]] == ["a_b"]
    assert key.call("GET", "/adapters/axb").status_code == 404


def test_operators_keys_have_no_adapters_to_be_limited_to(operator: Pusher) -> None:
    refused = operator.call("POST", "/keys", json={"name": "k", "scopes": ["admin"], "adapter_prefixes": ["a"]})
    assert (refused.status_code, refused.json()["field"]) == (422, "adapter_prefixes")
