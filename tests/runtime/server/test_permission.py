"""Without a good grant nothing happens: not a byte of the body is read, and no request reaches the engine."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

import openai
import pytest

from registry.serving.grants import GrantSigner
from registry.wire import GRANT_HEADER, GrantClaims
from tests.runtime.server.conftest import World
from tests.runtime.server.replica import REPLICA_ID, Replica, grant

BODY = {"model": "m", "prompt": "x", "max_tokens": 1}


def forged() -> str:
    now = int(time.time())
    claims = GrantClaims(aud=REPLICA_ID, jti="forged", iat=now, exp=now + 30, tenant="t", model="m", max_tokens=9, key_id="k")
    return GrantSigner("another secret").sign(claims)


def unsigned() -> str:
    header, payload, _ = grant().split(".")
    return f"{header}.{payload}."


def expired() -> str:
    past = int(time.time()) - 600
    return grant(iat=past, exp=past + 30)


BAD_GRANTS = [
    ("", "grant_missing"),
    ("nonsense", "grant_malformed"),
    (forged(), "grant_signature"),
    (unsigned(), "grant_signature"),
    (expired(), "grant_expired"),
    (grant(aud="replica-2"), "grant_audience"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("token", "code"), BAD_GRANTS, ids=[code for _, code in BAD_GRANTS])
def test_a_bad_grant_is_401(replica: Replica, path: str, token: str, code: str) -> None:
    response = replica.post(path, BODY, token=token)
    assert response.status_code == 401
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (code, "invalid_request_error", None)
    assert "x-lorary-form-digest" not in response.headers


def test_a_missing_header_is_401_and_the_clients_exception(replica: Replica) -> None:
    client = openai.OpenAI(base_url=f"{replica.url}/v1", api_key="lry_any", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="ask the registry"):
        client.completions.create(model="m", prompt="x")


def test_a_grant_is_good_once(replica: Replica) -> None:
    token = grant()
    assert replica.post("/v1/completions", BODY, token=token).status_code == 200
    again = replica.post("/v1/completions", BODY, token=token)
    assert (again.status_code, again.json()["error"]["code"]) == (401, "grant_replayed")


def test_a_grant_for_a_bad_request_is_spent_too(replica: Replica) -> None:
    token = grant()
    assert replica.post("/v1/completions", {"model": "m"}, token=token).status_code == 400
    assert replica.post("/v1/completions", BODY, token=token).status_code == 401


def test_permission_comes_before_the_body(replica: Replica) -> None:
    """The head announces a gigabyte; the answer comes without a byte of it."""
    address = urlsplit(replica.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n{GRANT_HEADER}: {forged()}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(200).startswith(b"HTTP/1.1 401")


def test_another_tenants_grant_names_another_adapter(world: World, replica: Replica) -> None:
    """Runtime identity is (tenant, form digest): the same bytes under another tenant are unknown here."""
    foreign = world.adapters[0]._replace(tenant="u" * 32)
    with pytest.raises(openai.BadRequestError, match="unknown here"):
        replica.client(foreign).completions.create(model="m", prompt="x")


def test_the_body_cannot_widen_the_grant(world: World, replica: Replica) -> None:
    """The model's name, digests or tenants in the body and in other headers change nothing."""
    key = world.adapters[0]
    headers = {"X-Lorary-Form-Digest": key.form_digest, "X-Lorary-Tenant": key.tenant, "Authorization": "Bearer lry_x"}
    body = {**BODY, "model": f"granted@{key.form_digest}", "temperature": 0, "max_tokens": 12}
    plain = replica.post("/v1/completions", {**body, "model": "m"}).json()["choices"]
    assert replica.post("/v1/completions", body, headers=headers).json()["choices"] == plain
