"""Tenants, keys, base models and jobs; who may what; where keys are kept."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from registry.cli.client import RegistryClient
from registry.cli.credentials import credentials_file
from tests.cli.conftest import Lorary, Registry


def test_tenants_are_created_listed_shown_and_deleted(admin: Lorary) -> None:
    made = admin.ok("tenants", "create", "short-lived")
    assert admin.ok("tenants", "show", "short-lived") == made
    assert "short-lived" in [tenant["name"] for tenant in admin.ok("tenants", "list")]
    assert admin("tenants", "delete", "short-lived").code == 2
    assert admin("tenants", "delete", "short-lived", "--yes").code == 0
    assert "short-lived" not in [tenant["name"] for tenant in admin.ok("tenants", "list")]


def test_a_listing_follows_every_page(admin: Lorary) -> None:
    names = {f"many-{number}" for number in range(60)}
    with RegistryClient(admin.url, token=admin.environment["LORARY_API_KEY"]) as client:
        for name in names:
            client.post("/tenants", {"name": name})
    assert names <= {tenant["name"] for tenant in admin.ok("tenants", "list")}


def test_a_problem_is_one_sentence_with_field_value_and_remedy_on_stderr(admin: Lorary) -> None:
    done = admin("tenants", "create", "models")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0] == "error: tenant name 'models' is reserved"
    for line in ("  field: name", "  value: models", "  remedy: choose another name"):
        assert line in done.stderr.splitlines()


def test_keys_are_made_once_listed_without_secrets_and_stop_when_revoked(admin: Lorary, tenant: Lorary) -> None:
    made = tenant.ok("keys", "create", "ci", "--scope", "adapters:read", "--expires-in", "2h")
    assert made["token"].startswith("lry_")
    assert made["expires_at"] is not None
    assert made["token"] not in str(tenant.ok("keys", "list"))
    assert tenant.ok("adapters", "list", LORARY_API_KEY=made["token"]) == []
    assert tenant("keys", "revoke", made["id"], "--yes").code == 0
    refused = tenant("adapters", "list", LORARY_API_KEY=made["token"])
    assert refused.code == 1
    assert "status: 401" in refused.stderr


def test_a_key_is_limited_to_adapters_and_rotated(tenant: Lorary) -> None:
    made = tenant.ok("keys", "create", "ci", "--scope", "adapters:read", "--adapter-prefix", "team-", "--adapter-prefix", "shared")
    assert made["adapter_prefixes"] == ["shared", "team-"]
    successor = tenant.ok("keys", "rotate", made["id"], "--overlap", "0")
    assert (successor["predecessor_id"], successor["adapter_prefixes"]) == (made["id"], made["adapter_prefixes"])
    assert tenant("adapters", "list", LORARY_API_KEY=made["token"]).code == 1
    assert tenant.ok("adapters", "list", LORARY_API_KEY=successor["token"]) == []
    assert tenant("keys", "rotate", successor["id"], "--overlap", "soon").code == 2


@pytest.mark.parametrize("lifetime", ["", "0d", "3 d", "3w", "-1h", "1.5h"])
def test_a_lifetime_that_is_none_is_a_usage_error(tenant: Lorary, lifetime: str) -> None:
    done = tenant("keys", "create", "ci", "--scope", "adapters:read", "--expires-in", lifetime)
    assert done.code == 2
    assert "--expires-in" in done.stderr


def test_no_command_takes_a_secret_as_a_flag(admin: Lorary) -> None:
    for command in (("keys", "login"), ("keys", "create"), ("adapters", "push"), ("up",)):
        options = [word for word in admin(*command, "--help").stdout.split() if word.startswith("--")]
        assert not [option for option in options if any(part in option for part in ("key", "token", "secret", "password"))]


def test_login_checks_the_key_and_keeps_it_for_this_url_alone(registry: Registry, tenant: Lorary) -> None:
    key = tenant.environment["LORARY_API_KEY"]
    assert tenant("keys", "login", stdin=f"{key}\n").code == 0
    file = credentials_file(tenant.state_dir)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert tenant("adapters", "list", LORARY_API_KEY="").code == 0
    other = registry.url.replace("127.0.0.1", "localhost")
    assert "status: 401" in tenant("adapters", "list", "--url", other, LORARY_API_KEY="").stderr, "the key went to another address"
    assert tenant("keys", "logout", LORARY_API_KEY="").code == 0
    assert tenant("adapters", "list", LORARY_API_KEY="").code == 1


@pytest.mark.parametrize("typed", ["", "\n", "lry_not_a_key\n"])
def test_a_key_that_is_not_accepted_is_not_kept(tenant: Lorary, typed: str) -> None:
    assert tenant("keys", "login", stdin=typed, LORARY_API_KEY="").code == 1
    assert not credentials_file(tenant.state_dir).exists()


def test_credentials_that_others_can_read_are_refused(tenant: Lorary) -> None:
    tenant("keys", "login", stdin=tenant.environment["LORARY_API_KEY"])
    file = credentials_file(tenant.state_dir)
    file.chmod(0o644)
    done = tenant("adapters", "list", LORARY_API_KEY="")
    assert done.code == 1
    assert f"chmod 600 {file}" in done.stderr


def test_damaged_credentials_are_named(tenant: Lorary) -> None:
    tenant("keys", "login", stdin=tenant.environment["LORARY_API_KEY"])
    credentials_file(tenant.state_dir).write_text("[]")
    done = tenant("adapters", "list", LORARY_API_KEY="")
    assert done.code == 1
    assert "is not a credentials file" in done.stderr


def test_an_admin_acts_inside_the_tenant_that_is_named(admin: Lorary, tenant: Lorary) -> None:
    name = tenant.ok("keys", "whoami")["tenant"]
    assert admin.ok("adapters", "list", "--tenant", name) == []
    assert admin.ok("adapters", "list", LORARY_TENANT=name) == []
    missing = admin("adapters", "list")
    assert missing.code == 1
    assert "X-Lorary-Tenant" in missing.stderr


def test_a_base_model_is_imported_and_listed(admin: Lorary, base_model: str, tiny_model_dir: Path) -> None:
    model = admin.ok("base-models", "show", base_model)
    assert (model["status"], model["location"]) == ("ready", str(tiny_model_dir))
    assert base_model in [known["name"] for known in admin.ok("base-models", "list")]


def test_an_import_that_fails_says_why(admin: Lorary, tmp_path: Path) -> None:
    done = admin("base-models", "add", "nothing", str(tmp_path))
    assert done.code == 1
    assert "base model nothing could not be imported:" in done.stderr
    assert str(tmp_path) in done.stderr
    assert admin("base-models", "delete", "nothing", "--yes").code == 0


def test_jobs_of_another_tenant_do_not_exist(admin: Lorary, base_model: str, tenant: Lorary) -> None:
    imported = next(job for job in admin.ok("jobs", "list") if job["kind"] == "import_base_model")
    assert admin.ok("jobs", "show", imported["id"])["state"] == "succeeded"
    for command in ("show", "watch"):
        done = tenant("jobs", command, imported["id"])
        assert done.code == 1
        assert "status: 404" in done.stderr
    assert admin("jobs", "cancel", imported["id"]).code == 1, "it is over"
