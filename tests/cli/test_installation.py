"""`lorary db`, `doctor`, `api`, `worker`, `runtime`, `--version`, and how output meets a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Lorary, Registry
from tests.cli.test_up import _answers, command, environment


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lorary:
    """The command on a state directory of its own, where nothing is yet."""
    return Lorary(monkeypatch, tmp_path / "local", url="http://127.0.0.1:9", key=None)


def checks(lorary: Lorary, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = lorary("doctor", "-o", "json", *arguments)
    return done.code, {finding["check"]: finding for finding in done.json()}


def test_init_makes_an_installation_once(local: Lorary) -> None:
    first = local.ok("db", "init")
    assert first["admin_key"].startswith("lry_")
    assert (local.state_dir / "secret.key").stat().st_mode & 0o777 == 0o600
    again = local.ok("db", "init")
    assert again["admin_key"] is None
    assert again["revision"] == first["revision"]


def test_stdout_has_data_alone(local: Lorary) -> None:
    done = local("db", "init", "-o", "json")
    assert set(json.loads(done.stdout)) == {"state_dir", "revision", "admin_key"}
    assert "store it now" in done.stderr
    assert json.loads(done.stdout)["admin_key"] not in done.stderr


def test_a_lost_admin_key_is_replaced_on_the_machine_itself(local: Lorary, registry: Registry) -> None:
    done = local("db", "admin-key", "lost", "-o", "json")
    assert done.code == 1
    assert "run `lorary db init` first" in done.stderr
    made = local.ok("db", "admin-key", "lost", LORARY_STATE_DIR=str(registry.settings.state_dir))
    assert local.ok("keys", "whoami", LORARY_URL=registry.url, LORARY_API_KEY=made["admin_key"])["scopes"] == ["admin"]


def test_generated_keys_are_stored_by_init_and_not_printed(local: Lorary) -> None:
    admin, replica = (local("keys", "generate").stdout.strip() for _ in range(2))
    done = local("db", "init", "-o", "json", LORARY_FIRST_ADMIN_KEY=admin, LORARY_REPLICA_KEY=replica)
    assert done.json()["admin_key"] is None
    assert admin not in done.stdout + done.stderr
    refused = local("db", "init", LORARY_REPLICA_KEY=replica[:-1])
    assert refused.code == 1
    assert "LORARY_REPLICA_KEY" in refused.stderr


def test_wait_ends_when_another_process_has_made_the_schema(local: Lorary) -> None:
    late = local("db", "wait", "--timeout", "0")
    assert late.code == 1
    assert "error" in late.stderr
    program = [sys.executable, "-m", "registry.cli", "db", "wait", "-o", "json", "--timeout", "60"]
    waiting = subprocess.Popen(program, env=environment(local.state_dir), stdout=subprocess.PIPE, text=True)
    time.sleep(0.2)
    head = local.ok("db", "init")["revision"]
    assert json.loads(waiting.communicate(timeout=60)[0]) == {"revision": head}
    assert waiting.returncode == 0


def test_doctor_minds_an_open_state_directory_only_when_something_lies_in_it(local: Lorary) -> None:
    local.state_dir.mkdir(mode=0o777)
    local.state_dir.chmod(0o777)
    assert checks(local)[1]["state directory"]["status"] == "ok", "as a volume of a pod, while everything lies elsewhere"
    (local.state_dir / "lorary.sqlite3").touch()
    assert checks(local)[1]["state directory"]["status"] == "failed"


def test_wait_tells_a_registry_that_is_ready_from_one_that_is_away(local: Lorary, registry: Registry) -> None:
    assert local.ok("wait", "--url", registry.url) == {"url": registry.url, "ready": True}
    away = local("wait", "--timeout", "0")
    assert away.code == 1
    assert "http://127.0.0.1:9 is not ready" in away.stderr


def test_init_waits_for_a_database_that_does_not_answer(local: Lorary) -> None:
    away = "postgresql://lorary_owner:x@127.0.0.1:9/lorary"
    urls = {"LORARY_DATABASE_URL": away.replace("owner", "app"), "LORARY_DATABASE_OWNER_URL": away}
    began = time.monotonic()
    done = local("db", "init", "--timeout", "1", **urls)
    assert done.code == 1
    assert time.monotonic() - began >= 1
    assert "does not answer" in done.stderr
    assert ":x@" not in done.stderr


def test_schema_goes_down_and_up_and_check_tells(local: Lorary) -> None:
    head = local.ok("db", "init")["revision"]
    assert local.ok("db", "check") == {"revision": head, "head": head, "differences": []}
    assert local("db", "downgrade", "base").code == 2, "nobody can answer here"
    assert local.ok("db", "downgrade", "base", "--yes") == {"revision": None}
    behind = local("db", "check")
    assert behind.code == 1
    assert "run `lorary db upgrade`" in behind.stderr
    assert local.ok("db", "upgrade") == {"revision": head}
    assert local("db", "check").code == 0


def test_check_names_what_was_changed_by_hand(local: Lorary) -> None:
    local.ok("db", "init")
    with contextlib.closing(sqlite3.connect(local.state_dir / "lorary.sqlite3")) as database:
        database.execute("ALTER TABLE tenants ADD COLUMN stray TEXT")
    done = local("db", "check", "-o", "json")
    assert done.code == 1
    assert "stray" in str(done.json()["differences"])


@pytest.mark.parametrize("arguments", [("db", "upgrade", "no-such"), ("db", "downgrade", "no-such", "--yes")])
def test_an_unknown_revision_is_a_sentence(local: Lorary, arguments: tuple[str, ...]) -> None:
    local.ok("db", "init")
    done = local(*arguments)
    assert done.code == 1
    assert "no-such" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_does_not_answer_is_a_sentence(local: Lorary, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = local("db", "init", LORARY_DATABASE_URL=f"sqlite:///{tmp_path}/file/db")
    assert done.code == 1
    assert "the database does not answer" in done.stderr


def test_doctor_on_nothing_says_what_to_do_first(local: Lorary) -> None:
    code, findings = checks(local)
    assert code == 1
    assert {name for name, finding in findings.items() if finding["status"] == "failed"} == {
        "state directory",
        "secret key",
        "database schema",
        "api",
    }
    assert not local.state_dir.exists(), "looking changes nothing"


def test_doctor_finds_open_secrets(local: Lorary) -> None:
    local.ok("db", "init")
    (local.state_dir / "secret.key").chmod(0o644)
    local.state_dir.chmod(0o777)
    code, findings = checks(local)
    assert code == 1
    assert findings["secret key"]["status"] == findings["state directory"]["status"] == "failed"
    assert findings["secret key"]["remedy"].startswith("chmod 600")


def test_doctor_finds_lost_and_damaged_blobs(local: Lorary, registry: Registry, tenant: Lorary, tmp_path: Path) -> None:
    from registry.artifact.digest import sha256_hex
    from registry.cli.client import RegistryClient

    blobs = [b"one of three", b"two of three", b"three of three"]
    with RegistryClient(registry.url, token=tenant.environment["LORARY_API_KEY"]) as client:
        for data in blobs:
            client.upload(f"/blobs/{sha256_hex(data)}", [data], size=len(data))
    installation = {"LORARY_STATE_DIR": str(registry.settings.state_dir)}
    stored = [next(registry.settings.blob_dir.rglob(sha256_hex(data))) for data in blobs]
    stored[0].unlink()
    stored[1].chmod(0o600)
    stored[1].write_bytes(b"two of threE")
    stored[2].chmod(0o600)
    stored[2].write_bytes(b"three of")
    done = local("doctor", "--blobs", "all", "-o", "json", **installation)
    [finding] = [finding for finding in done.json() if finding["check"] == "blobs"]
    assert done.code == 1
    assert finding["status"] == "failed"
    assert finding["detail"].startswith("1 corrupt, 1 missing, 1 truncated; ")
    [tenant_id] = {path.parent.name for path in stored}
    expected = zip(("missing", "corrupt", "truncated"), map(sha256_hex, blobs), strict=True)
    assert sorted(finding["items"]) == sorted(f"{what} {tenant_id}/{digest}" for what, digest in expected)
    stored[0].write_bytes(blobs[0])
    stored[1].write_bytes(blobs[1])
    stored[2].write_bytes(blobs[2])
    [finding] = [finding for finding in local("doctor", "-o", "json", **installation).json() if finding["check"] == "blobs"]
    assert finding["status"] == "ok"


def test_version_and_usage(admin: Lorary) -> None:
    assert admin("--version").stdout == f"lorary {version('lorary')}\n"
    for arguments in (
        ("nonsense",),
        ("tenants", "create"),
        ("adapters", "list", "-o", "yaml"),
        ("adapters", "alias", "set", "a", "b", "0"),
    ):
        assert admin(*arguments).code == 2, arguments
    assert "Usage:" in admin("adapters", "push", "--help").stdout


def test_api_and_worker_become_their_parts(tmp_path: Path) -> None:
    from registry.cli.ports import free_port

    state_dir = tmp_path / "state"
    assert command(state_dir, "db", "init").returncode == 0
    port = free_port("127.0.0.1")
    parts = [["api", "--port", str(port)], ["worker"]]
    processes = [
        subprocess.Popen([sys.executable, "-m", "registry.cli", *part], env=environment(state_dir), stderr=subprocess.PIPE)
        for part in parts
    ]
    deadline = time.monotonic() + 60
    while not _answers(f"http://127.0.0.1:{port}"):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
        _out, errors = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM), errors.decode()


def test_runtime_passes_its_flags_on(tmp_path: Path) -> None:
    done = command(tmp_path, "runtime", "--", "--model-dir", str(tmp_path), "--port", "none")
    assert done.returncode == 1
    assert "port is 'none'" in done.stderr


@pytest.mark.parametrize("no_color", [False, True])
def test_colour_is_for_terminals_that_want_it(tmp_path: Path, no_color: bool) -> None:
    ours, theirs = pty.openpty()
    given = environment(tmp_path) | {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    given = {name: value for name, value in given.items() if no_color or name != "NO_COLOR"}
    arguments = [sys.executable, "-m", "registry.cli", "tenants", "list", "--url", "http://127.0.0.1:9"]
    done = subprocess.run(arguments, env=given, stderr=theirs, stdout=subprocess.PIPE, check=False, timeout=60)
    os.close(theirs)
    said = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 1
    assert "cannot reach the registry" in said
    assert ("\x1b[1;31m" in said) is not no_color
