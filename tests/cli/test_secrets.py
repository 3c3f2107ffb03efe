"""`lorary secrets`, `db reseal`, and what `doctor` says about secrets."""

from __future__ import annotations

from tests.cli.conftest import Lorary, Registry


def finding(local: Lorary, **environment: str) -> tuple[str, str]:
    found = {row["check"]: row for row in local("doctor", "-o", "json", **environment).json()}["secrets"]
    return found["status"], found["detail"]


def test_secrets_are_set_from_stdin_listed_and_deleted(tenant: Lorary) -> None:
    assert tenant("secrets", "set", "hub-token", "-o", "json", stdin="hf_123\n").code == 0
    (listed,) = tenant.ok("secrets", "list")
    assert listed["name"] == "hub-token"
    assert "hf_123" not in str(listed)
    assert tenant("secrets", "set", "empty", stdin="\n").code == 1
    assert tenant("secrets", "delete", "hub-token").code == 2
    assert tenant("secrets", "delete", "hub-token", "--yes").code == 0
    assert tenant.ok("secrets", "list") == []


def test_the_secret_key_is_replaced_with_overlap(registry: Registry, tenant: Lorary) -> None:
    tenant("secrets", "set", "one", stdin="1")
    installation = {"LORARY_STATE_DIR": str(registry.settings.state_dir)}
    old, new = registry.settings.secret_key.get_secret_value(), "n" * 48
    assert finding(tenant, **installation)[0] == "ok"
    replaced = installation | {"LORARY_SECRET_KEY": new}
    assert finding(tenant, **replaced)[0] == "failed"
    overlap = replaced | {"LORARY_SECRET_KEY_PREVIOUS": old}
    assert finding(tenant, **overlap)[0] == "warning"
    assert tenant("db", "reseal", "-o", "json", **overlap).json()["resealed"] >= 1
    assert finding(tenant, **replaced)[0] == "ok"
    back = installation | {"LORARY_SECRET_KEY": old, "LORARY_SECRET_KEY_PREVIOUS": new}
    assert tenant("db", "reseal", **back).code == 0
    assert tenant("db", "reseal", **replaced).code == 1
