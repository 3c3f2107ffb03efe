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
from registry.config import Settings, load_settings
from registry.db import Database
from registry.tenants import service
from registry.tenants.keys import key_id_of
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
