"""Making an installation: idempotent, one admin key ever, the secret key file whole and private."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

import migrations
from registry.app import create_app
from registry.bootstrap import init_database
from registry.config import FirstKeys, Settings, load_settings
from registry.db import Database
from registry.tenants import service
from registry.tenants.keys import key_id_of, new_key
from tests.registry.conftest import bearer


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("LORARY_SECRET_KEY", raising=False)
    return Settings(state_dir=tmp_path / "deep" / "state")


def test_a_new_installation_works_with_its_first_key(fresh: Settings) -> None:
    made = init_database(fresh)
    assert made.admin_token is not None
    with TestClient(create_app(made.settings)) as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/api/v1/whoami", headers=bearer(made.admin_token)).json()["scopes"] == ["admin"]
        events = client.get("/api/v1/audit", headers=bearer(made.admin_token)).json()["items"]
    assert [(event["action"], event["key_id"]) for event in events] == [("key.created", "system")]


def test_the_second_time_changes_nothing(fresh: Settings) -> None:
    first, second = init_database(fresh), init_database(fresh)
    assert second.admin_token is None
    assert second.settings.secret_key == first.settings.secret_key
    assert load_settings(state_dir=fresh.state_dir).secret_key == first.settings.secret_key


def test_a_revoked_first_key_is_not_replaced(fresh: Settings) -> None:
    """Or whoever can run `db init` again would undo a revocation."""
    made = init_database(fresh)
    assert made.admin_token is not None
    with TestClient(create_app(made.settings)) as client:
        client.delete(f"/api/v1/keys/{key_id_of(made.admin_token)}", headers=bearer(made.admin_token))
    assert init_database(fresh).admin_token is None


def test_secret_key_file_is_private_and_alone(fresh: Settings) -> None:
    made = init_database(fresh)
    mode = stat.S_IMODE(fresh.secret_key_file.stat().st_mode)
    assert mode == 0o600
    assert len(fresh.secret_key_file.read_text().strip()) >= 64
    assert made.settings.secret_key.get_secret_value() == fresh.secret_key_file.read_text().strip()
    assert sorted(path.name for path in fresh.state_dir.iterdir() if "key" in path.name) == ["secret.key"]


def test_a_given_secret_key_is_used_and_not_written(fresh: Settings) -> None:
    given = fresh.model_copy(update={"secret_key": SecretStr("g" * 40)})
    assert init_database(given).settings.secret_key.get_secret_value() == "g" * 40
    assert not fresh.secret_key_file.exists()


def test_a_short_secret_key_is_refused_before_anything_is_made(fresh: Settings) -> None:
    with pytest.raises(ValueError, match="at least 32"):
        init_database(fresh.model_copy(update={"secret_key": SecretStr("short")}))
    assert not (fresh.state_dir / "lorary.sqlite3").exists()


def test_many_at_once_make_one_key(fresh: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: init_database(fresh), range(4)))
    assert sum(result.admin_token is not None for result in made) == 1
    assert len({result.settings.secret_key.get_secret_value() for result in made}) == 1


def test_a_crash_before_the_key_is_made_up_for(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(service, "issue_key", crash)
        with pytest.raises(Crash):
            init_database(fresh)
    assert migrations.revision_of(fresh.resolved_database_url) == migrations.head_revision()
    assert init_database(fresh).admin_token is not None


def test_init_upgrades_an_old_schema_and_keeps_its_rows(fresh: Settings) -> None:
    made = init_database(fresh)
    database = Database(fresh.resolved_database_url)
    with database.write() as session:
        session.execute(service.Tenant.__table__.insert().values(id="1", name="acme"))
    database.close()
    assert init_database(fresh).admin_token is None
    database = Database(made.settings.resolved_database_url)
    with database.read() as session:
        assert service.get_tenant(session, "acme").id == "1"
    database.close()


# ---- keys that an operator made, and schemas of a later release ----


def given_keys(admin: str, replica: str) -> FirstKeys:
    return FirstKeys(first_admin_key=SecretStr(admin), replica_key=SecretStr(replica))


def scopes_of(made_settings: Settings, token: str) -> list[str] | int:
    with TestClient(create_app(made_settings)) as client:
        answer = client.get("/api/v1/whoami", headers=bearer(token))
    return list(answer.json()["scopes"]) if answer.status_code == 200 else answer.status_code


def test_given_keys_are_stored_and_nothing_is_told(fresh: Settings) -> None:
    admin, replica = new_key().token, new_key().token
    made = init_database(fresh, keys=given_keys(admin, replica))
    assert made.admin_token is None
    assert scopes_of(made.settings, admin) == ["admin"]
    assert scopes_of(made.settings, replica) == ["replica"]
    assert init_database(fresh, keys=given_keys(admin, replica)).admin_token is None, "again changes nothing"


def test_a_given_admin_key_is_only_ever_the_first(fresh: Settings) -> None:
    """Or whoever can change the given one would make themselves an administrator; a replica's may be replaced."""
    made = init_database(fresh)
    late, replica = new_key().token, new_key().token
    init_database(fresh, keys=given_keys(late, replica))
    assert scopes_of(made.settings, late) == 401
    assert scopes_of(made.settings, replica) == ["replica"]


def test_a_revoked_replica_key_does_not_come_back(fresh: Settings) -> None:
    admin, replica = new_key().token, new_key().token
    made = init_database(fresh, keys=given_keys(admin, replica))
    with TestClient(create_app(made.settings)) as client:
        client.delete(f"/api/v1/keys/{key_id_of(replica)}", headers=bearer(admin))
    init_database(fresh, keys=given_keys(admin, replica))
    assert scopes_of(made.settings, replica) == 401


def test_a_given_key_that_is_none_is_refused_by_name_before_anything_is_made(fresh: Settings) -> None:
    with pytest.raises(ValueError, match="LORARY_REPLICA_KEY is not shaped like") as refused:
        init_database(fresh, keys=given_keys("", "hunter2"))
    assert "hunter2" not in str(refused.value)
    assert not fresh.state_dir.exists()


def test_a_program_that_was_rolled_back_serves_the_newer_schema_and_leaves_it(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout migrates first: pods of the release before must stay ready, or the upgrade is an outage."""
    made = init_database(fresh)
    known = migrations._known_revisions()
    head = migrations.head_revision()
    monkeypatch.setattr(migrations, "_known_revisions", lambda: known - {head})
    monkeypatch.setattr(migrations, "head_revision", lambda: max(known - {head}))
    assert migrations.is_newer(migrations.revision_of(fresh.resolved_database_url))
    assert init_database(fresh).admin_token is None
    assert migrations.revision_of(fresh.resolved_database_url) == head
    with TestClient(create_app(made.settings)) as client:
        assert client.get("/readyz").status_code == 200


def test_secrets_come_from_files_of_their_variables_names(fresh: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "lorary_secret_key").write_text("f" * 40 + "\n")
    (folder / "lorary_secret_key_previous").write_text("one,two")
    (folder / "lorary_s3_secret_access_key").write_text("s3-secret\n")
    (folder / "lorary_replica_key").write_text("lry_x")
    monkeypatch.setenv("LORARY_SECRETS_DIR", str(folder))
    settings = load_settings(state_dir=fresh.state_dir)
    assert settings.secret_key.get_secret_value() == "f" * 40
    assert [key.get_secret_value() for key in settings.secret_key_previous] == ["one", "two"]
    assert settings.s3.secret_access_key.get_secret_value() == "s3-secret"
    assert FirstKeys().replica_key.get_secret_value() == "lry_x"
    monkeypatch.setenv("LORARY_SECRET_KEY", "v" * 40)
    assert load_settings(state_dir=fresh.state_dir).secret_key.get_secret_value() == "v" * 40, "a variable beats a file"


def test_a_folder_of_secrets_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORARY_SECRETS_DIR", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"LORARY_SECRETS_DIR is .*absent.*no directory"):
        load_settings()
