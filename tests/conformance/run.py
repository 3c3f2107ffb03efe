"""`make conformance`: schemathesis over the whole OpenAPI document, against a registry of its own in real processes.

    python -m tests.conformance.run --schemathesis PATH/TO/st [--seconds 120] [--seed 1]

A tenant's key, then an admin's inside a tenant, then an admin's alone; generated and stateful. No answer may be a server error,
have a status, content type or header that the document does not name, or a body unlike its schema. Ends with 1 on the first that is.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

import migrations
from registry.audit.service import record
from registry.config import Settings
from registry.db import Database
from registry.tenants import service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import ADMIN, TENANT_SCOPES, KeyHasher
from tests.servers import free_ports, wait_until

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"
SECRET_KEY = "a-secret-key-of-the-conformance-run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=120, help="of each of the three runs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorary-conformance-") as folder:
        settings = Settings(state_dir=Path(folder), secret_key=SECRET_KEY, port=free_ports(1)[0])
        tenant, admin = _prepare(settings)
        process = _start(settings)
        try:
            url = f"http://127.0.0.1:{settings.port}"
            wait_until(lambda: _answers(url), process=process)
            for who, headers in (
                ("a tenant", [f"Authorization: Bearer {tenant}"]),
                ("an admin in a tenant", [f"Authorization: Bearer {admin}", "X-Lorary-Tenant: acme"]),
                ("an admin", [f"Authorization: Bearer {admin}"]),
            ):
                print(f"\n== {who} ==", flush=True)
                _fuzz(options, url, headers=headers, folder=Path(folder))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _prepare(settings: Settings) -> tuple[str, str]:
    """Keys of a tenant and of an admin in a new database."""
    migrations.upgrade(settings.resolved_database_url)
    database, hasher = Database(settings.resolved_database_url), KeyHasher(SECRET_KEY)
    tokens = []
    with database.system_write() as session:
        tenant = service.create_tenant(session, subject=SYSTEM, name="acme", record=record)
        for tenant_id, scopes in ((tenant.id, sorted(TENANT_SCOPES)), (None, [ADMIN])):
            _key, token = service.issue_key(
                session, subject=SYSTEM, tenant_id=tenant_id, name="fuzz", scopes=scopes, expires_at=None, hasher=hasher, record=record
            )
            tokens.append(token)
    database.close()
    return tokens[0], tokens[1]


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    given = {"STATE_DIR": settings.state_dir, "SECRET_KEY": SECRET_KEY, "PORT": settings.port, "LOG_LEVEL": "ERROR", "DRAIN_S": 5}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORARY_")}
    environment |= {f"LORARY_{name}": str(value) for name, value in given.items()}
    return subprocess.Popen([sys.executable, "-m", "registry"], env=environment)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/livez", timeout=5).status_code == 200
    except httpx2.TransportError:
        time.sleep(0.2)
        return False


def _fuzz(options: argparse.Namespace, url: str, *, headers: list[str], folder: Path) -> None:
    """Names with a pattern are rarely met by chance, which is no fault of the API: hence the health check that is off."""
    command = [options.schemathesis.absolute(), "run", f"{url}/openapi.json", "--checks", CHECKS, "--phases", "coverage,fuzzing,stateful"]
    command += ["--max-examples", "10", "--seed", str(options.seed), "--max-time", str(options.seconds), "--continue-on-failure"]
    command += ["--request-timeout", "20", "--warnings", "off", "--no-color", "--suppress-health-check", "filter_too_much"]
    for header in headers:
        command += ["--header", header]
    done = subprocess.run([str(part) for part in command], check=False, timeout=3 * options.seconds + 300, cwd=folder)
    if done.returncode != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
