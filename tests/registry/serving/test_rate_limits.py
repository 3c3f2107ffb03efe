"""Tenants with a limit at the front door: what is reserved, what they hear of it, and what comes back to them."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from gpu_runtime.server.grants import GrantVerifier
from registry.quotas import repository
from registry.wire import GRANT_HEADER, GrantClaims
from tests.registry.quotas.test_rates import wait_for_room
from tests.registry.serving.conftest import World, closed_port_url, make_replica
from tests.registry.serving.fake_replica import FakeReplica
from tests.registry.serving.test_front_door import complete, one_replica, ready, replica
from tests.registry.statements import recorded

__all__ = ["one_replica", "ready", "replica"]


def limit(http: httpx2.Client, world: World, tenant: str = "acme", **limits: Any) -> None:
    answer = http.patch(f"/api/v1/tenants/{tenant}/quota", json=limits, headers=world.bearer("admin"))
    assert answer.status_code == 200, answer.text
    wait_for_room(world.database)


def tokens_of(world: World) -> int:
    with world.database.read() as session:
        return repository.minute_of(session, world.tenants["acme"]).tokens


def granted(world: World, replica: FakeReplica, replica_id: str) -> GrantClaims:
    return GrantVerifier(replica_id, world.signer.public_keys).verify(replica.requests[-1][1][GRANT_HEADER.lower()])


def test_requests_a_minute(world: World, served: httpx2.Client, ready: str) -> None:
    world.push("acme", "pirate")
    world.push("rival", "pirate")
    limit(served, world, requests_per_minute=2)
    first = complete(served, world)
    assert first.status_code == 200
    assert first.headers["RateLimit-Policy"] == '"requests";q=2;w=60'
    assert first.headers["RateLimit"].startswith('"requests";r=1;t=')
    assert complete(served, world, behave="bad_request").headers["RateLimit"].startswith('"requests";r=0;t=')
    refused = complete(served, world)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["RateLimit"].startswith('"requests";r=0;t=')
    theirs = complete(served, world, key="rival")
    assert (theirs.status_code, "RateLimit" in theirs.headers) == (200, False)
    limit(served, world, requests_per_minute="unlimited")
    assert complete(served, world).status_code == 200


def test_the_openai_client_raises_what_it_knows(world: World, served: httpx2.Client, ready: str) -> None:
    world.push("acme", "pirate")
    limit(served, world, tokens_per_minute=0)
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key=world.keys["acme"], max_retries=0)
    with client, pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="pirate", prompt="x")
    assert (refused.value.code, refused.value.type) == ("insufficient_quota", "insufficient_quota")


@pytest.mark.postgresql
def test_what_is_reserved_stands_in_the_grant(world: World, served: httpx2.Client, replica: FakeReplica, ready: str) -> None:
    world.push("acme", "pirate")
    limit(served, world, tokens_per_minute=100)
    assert complete(served, world, max_tokens=59, prompt="abcd").headers["RateLimit"].startswith('"tokens";r=40;t=')
    claims = granted(world, replica, ready)
    assert (claims.reserved_tokens, claims.max_tokens, tokens_of(world)) == (60, 100, 60)
    assert claims.minute > 0
    assert len(claims.key_id) == 12
    assert complete(served, world, max_tokens=41, prompt="").status_code == 429
    too_large = complete(served, world, max_tokens=200, prompt="abcd")
    assert (too_large.status_code, "Retry-After" in too_large.headers) == (429, False)
    limit(served, world, tokens_per_minute=None)
    complete(served, world, max_tokens=59, prompt="abcd")
    claims = granted(world, replica, ready)
    assert (claims.reserved_tokens, claims.minute, claims.max_tokens) == (0, 0, world.settings.max_request_tokens)


def test_what_nobody_began_on_uses_no_tokens(world: World, served: httpx2.Client, replica: FakeReplica) -> None:
    world.push("acme", "pirate")
    limit(served, world, tokens_per_minute=100)
    assert complete(served, world).json()["error"]["code"] == "no_replica"
    assert tokens_of(world) == 0
    dead = make_replica(served, world, url=closed_port_url())
    assert complete(served, world).status_code == 503
    assert tokens_of(world) == 0
    world.execute("UPDATE replicas SET state = 'draining' WHERE id = :id", id=dead)
    make_replica(served, world, url=replica.url)
    assert complete(served, world, behave="busy").status_code == 503
    assert tokens_of(world) == 0
    complete(served, world, behave="die")
    assert tokens_of(world) == 17, "it may have begun: what was reserved stands until the minute ends"


def test_a_limit_costs_one_statement_and_none_costs_nothing(world: World, served: httpx2.Client, ready: str) -> None:
    world.push("acme", "pirate")
    complete(served, world)
    with recorded(world.app) as unlimited:
        complete(served, world)
    assert not any("rate_windows" in statement for statement in unlimited)
    limit(served, world, requests_per_minute=50, tokens_per_minute=5000)
    complete(served, world)
    with recorded(world.app) as limited:
        complete(served, world)
    assert len(limited) == len(unlimited) + 1
    assert sum("rate_windows" in statement for statement in limited) == 1
