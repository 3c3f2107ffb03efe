"""Signed pushes through the one gate: policies, keys that come and go, other tenants, and the library's second opinion."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select

from registry.db import Database, reaching_tenant
from registry.errors import Invalid
from registry.signing import service
from registry.signing.models import SigningKey
from tests.registry.adapters.pushing import Pusher, adapter
from tests.registry.conftest import MakeKey, bearer
from tests.registry.signing.conftest import KeyPair, make_pair

FILES = adapter(1).files | {"README.md": b"# Pirate\n"}
Trust = Callable[..., None]
Work = Callable[[], int]

pytestmark = pytest.mark.usefixtures("base_model")


def verdict(tenant: Pusher, number: int = 1) -> dict[str, Any]:
    signature: dict[str, Any] = tenant.get(f"/adapters/pirate/versions/{number}")["signature"]
    return signature


def refused(tenant: Pusher, files: dict[str, bytes]) -> str:
    """The code with which a push of `files` is refused, after which there is nothing."""
    before = tenant.get("/adapters")["items"]
    answer = tenant.push("pirate", files)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == "model.sig"
    assert tenant.get("/adapters")["items"] == before
    return str(answer.json()["code"])


@pytest.mark.postgresql
def test_a_signed_version_says_who_vouches_for_it_and_so_does_the_library(
    *, acme: Pusher, operator: Pusher, pair: KeyPair, trust: Trust, work: Work, tmp_path: Path
) -> None:
    trust(acme, pair)
    assert refused(acme, FILES) == "signature_required"
    pushed = acme.push("pirate", pair.signed(FILES))
    assert (pushed.status_code, pushed.json()["signature"]["verdict"]) == (201, "verified")
    assert work() == 1
    version = acme.get("/adapters/pirate/versions/1")
    assert version["status"] == "ready"
    assert (version["signature"]["key"], version["signature"]["key_revoked_at"]) == ("release", None)
    folder = tmp_path / "pulled"
    folder.mkdir()
    for file in version["files"]:
        (folder / file["path"]).write_bytes(acme.call("GET", f"/adapters/pirate/versions/1/files/{file['path']}").content)
    from model_signing import verifying

    verifying.Config().use_elliptic_key_verifier(public_key=pair.folder / "key.pub").verify(folder, folder / "model.sig")
    assert acme.call("DELETE", "/signing-keys/release").status_code == 204
    assert (verdict(acme)["verdict"], verdict(acme)["key"]) == ("key_revoked", "release")
    assert verdict(acme)["verified_at"] <= verdict(acme)["key_revoked_at"]
    actions = {event["action"] for event in operator.get("/audit")["items"]}
    assert {"signing_key.added", "signing_key.revoked", "signing_policy.changed", "version.verified"} <= actions


def test_policies_by_what_is_pushed(acme: Pusher, pair: KeyPair, trust: Trust, tmp_path: Path) -> None:
    stranger = make_pair(tmp_path / "stranger")
    assert acme.push("pirate", stranger.signed(FILES)).json()["signature"]["verdict"] == "unchecked"
    trust(acme, pair, policy="verify_if_present")
    assert acme.push("pirate", FILES).json()["signature"]["verdict"] == "unsigned"
    assert acme.push("pirate", pair.signed(FILES)).json()["signature"]["verdict"] == "verified"
    assert acme.push("pirate", stranger.signed(FILES)).json()["code"] == "signature_key_unknown"
    assert verdict(acme, 1)["verdict"] == "unchecked", "a version from before stays what it was"


def test_signatures_that_do_not_cover_the_push(acme: Pusher, pair: KeyPair, trust: Trust) -> None:
    trust(acme, pair)
    good = pair.signed(FILES)
    assert refused(acme, {**good, "README.md": b"# Ninja\n"}) == "signature_mismatch"
    assert refused(acme, {name: data for name, data in good.items() if name != "README.md"}) == "signature_mismatch"
    assert refused(acme, pair.signed(adapter(1).files) | {"README.md": b"more"}) == "signature_mismatch"
    assert refused(acme, FILES | {"model.sig": pair.sign(FILES | {"optimizer.pt": b"x"})}) == "signature_mismatch"
    forged = json.loads(good["model.sig"])
    forged["dsseEnvelope"]["signatures"][0]["sig"] = "MAYCAQECAQE="
    assert refused(acme, {**good, "model.sig": json.dumps(forged).encode()}) == "signature_invalid"
    assert refused(acme, {**good, "model.sig": b"{}"}) == "bad_signature_file"
    forged["verificationMaterial"]["publicKey"]["hint"] = None
    assert refused(acme, {**good, "model.sig": json.dumps(forged).encode()}) == "signature_key_unknown"


def test_bundles_without_a_hint_are_tried_with_every_key(acme: Pusher, pair: KeyPair, trust: Trust, tmp_path: Path) -> None:
    trust(acme, make_pair(tmp_path / "first"), name="first")
    trust(acme, pair)
    bundle = json.loads(pair.sign(FILES))
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    pushed = acme.push("pirate", FILES | {"model.sig": json.dumps(bundle).encode()})
    assert pushed.json()["signature"]["key"] == "release", pushed.text


def test_rotation(acme: Pusher, pair: KeyPair, trust: Trust, work: Work, tmp_path: Path) -> None:
    following = make_pair(tmp_path / "next")
    trust(acme, pair, name="old")
    trust(acme, following, name="new")
    assert acme.push("pirate", pair.signed(FILES)).status_code == 201
    assert acme.call("DELETE", "/signing-keys/old").status_code == 204
    assert acme.call("DELETE", "/signing-keys/old").status_code == 204, "revoking again changes nothing"
    assert work() == 1
    version = acme.get("/adapters/pirate/versions/1")
    assert (version["status"], version["reason"]["code"]) == ("rejected", "signature_key_revoked"), "revoked while it was checked"
    answer = acme.push("pirate", pair.signed(adapter(2).files))
    assert answer.json()["code"] == "signature_key_revoked"
    assert acme.push("pirate", following.signed(FILES)).status_code == 201
    again = acme.call("POST", "/signing-keys", json={"name": "again", "public_key": pair.public})
    assert (again.status_code, again.json()["field"]) == (409, "public_key")
    taken = acme.call("POST", "/signing-keys", json={"name": "new", "public_key": make_pair(tmp_path / "third").public})
    assert (taken.status_code, taken.json()["field"]) == (409, "name")
    assert [key["revoked_at"] is None for key in acme.get("/signing-keys")] == [True, False]


def test_the_same_bytes_are_judged_again(acme: Pusher, pair: KeyPair, trust: Trust, work: Work) -> None:
    files = pair.signed(FILES)
    assert acme.push("pirate", files).json()["signature"]["verdict"] == "unchecked"
    trust(acme, pair)
    assert work() == 1
    pushed = acme.push("pirate", files)
    assert (pushed.status_code, pushed.json()["signature"]["verdict"]) == (200, "verified")
    assert acme.call("DELETE", "/adapters/pirate/versions/1").status_code == 204
    assert acme.call("DELETE", "/signing-keys/release").status_code == 204
    assert acme.push("pirate", files).json()["code"] == "signature_key_revoked", "a deleted version does not come back unvouched"


@pytest.mark.full
def test_a_revocation_and_a_push_come_one_after_the_other(acme: Pusher, app: FastAPI, pair: KeyPair, trust: Trust) -> None:
    """A push that relies on a key holds it: whoever revokes meanwhile comes after, and the version shows it."""
    trust(acme, pair)
    database: Database = app.state.database
    with database.system_read() as session:
        tenant_id = session.scalars(select(SigningKey.tenant_id)).one()
    with reaching_tenant(tenant_id), ThreadPoolExecutor(1) as pool:
        with database.read() as session:
            (key,) = service.trust_of(session, tenant_id).keys
        with database.write() as session:
            service.require_trusted(session, tenant_id, key)
            revoking = pool.submit(acme.call, "DELETE", "/signing-keys/release")
            assert not wait([revoking], timeout=0.5).done
        assert revoking.result().status_code == 204
        with pytest.raises(Invalid, match="is revoked"), database.write() as session:
            service.require_trusted(session, tenant_id, key)


@pytest.mark.postgresql
def test_a_tenant_s_keys_and_policy_are_its_own(acme: Pusher, globex: Pusher, pair: KeyPair, trust: Trust) -> None:
    trust(acme, pair)
    assert globex.get("/signing-keys") == []
    assert globex.get("/signing-policy") == {
        "policy": "off", "floor": "off", "effective": "off", "updated_at": None, "updated_by": None,
    }  # fmt: skip
    assert globex.call("DELETE", "/signing-keys/release").status_code == 404
    assert globex.call("PUT", "/signing-policy", json={"policy": "require"}).status_code == 200
    assert globex.push("pirate", pair.signed(FILES)).json()["code"] == "signature_key_unknown"
    assert globex.call("POST", "/signing-keys", json={"name": "release", "public_key": pair.public}).status_code == 201


def test_operators_may_require_signatures(acme: Pusher, operator: Pusher) -> None:
    tenant = {"X-Lorary-Tenant": "acme"}
    assert acme.call("PUT", "/signing-policy", json={"floor": "off"}).status_code == 403
    set_floor = operator.call("PUT", "/signing-policy", json={"floor": "require"}, headers=tenant)
    assert (set_floor.status_code, set_floor.json()["effective"]) == (200, "require"), set_floor.text
    assert refused(acme, FILES) == "signature_required"
    lower = acme.call("PUT", "/signing-policy", json={"policy": "verify_if_present"})
    assert (lower.status_code, lower.json()["code"]) == (409, "policy_floor")
    assert operator.call("PUT", "/signing-policy", json={"floor": "off"}, headers=tenant).json()["effective"] == "off"
    assert acme.push("pirate", FILES).status_code == 201


def test_who_may_change_trust(client: Any, acme: Pusher, make_key: MakeKey, pair: KeyPair) -> None:
    pushing = Pusher(client, bearer(make_key("adapters:write", "adapters:read", tenant="acme")))
    body = {"name": "mine", "public_key": pair.public}
    assert pushing.call("POST", "/signing-keys", json=body).status_code == 403
    assert pushing.call("PUT", "/signing-policy", json={"policy": "off"}).status_code == 403
    assert pushing.get("/signing-keys") == []
    for wrong in ({}, {"policy": "sometimes"}, {"policy": "off", "more": 1}):
        assert acme.call("PUT", "/signing-policy", json=wrong).status_code == 422
    assert acme.call("POST", "/signing-keys", json={"name": "x", "public_key": "-"}).json()["code"] == "bad_public_key"


def test_a_version_whose_key_was_revoked_does_not_come_back(acme: Pusher, pair: KeyPair, trust: Trust, work: Work) -> None:
    trust(acme, pair)
    acme.push("pirate", pair.signed(FILES))
    work()
    acme.call("DELETE", "/adapters/pirate/versions/1")
    assert acme.call("DELETE", "/signing-keys/release").status_code == 204
    back = acme.call("POST", "/adapters/pirate/versions/1/restore")
    assert (back.status_code, back.json()["code"]) == (409, "signature_key_revoked")
