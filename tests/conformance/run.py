"""`make conformance`: schemathesis over the whole OpenAPI document, against a registry and a worker of its own in real processes.

    python -m tests.conformance.run --schemathesis PATH/TO/st [--seconds 60] [--seed 1] [--only owner]

Generated requests, then stateful ones (`GET /jobs` gives the id that `POST /jobs/{id}/cancel` takes), by five callers. No answer may
be a server error, have a status, content type or header that the document does not name, or a body unlike its schema; and what a
stranger names that exists must answer as what does not (`hooks.py`). Ends with 1 on the first that is, and where a run saw too little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from pydantic import SecretStr

from registry.config import Settings
from tests.conformance import world
from tests.servers import free_ports, wait_until

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"
CHECKS += ",Seen,LooksLikeNothing"
PHASES = {"coverage,fuzzing": 1.0, "stateful": 0.4}
"""The share of all operations that each must call at least: stateful runs go where links lead."""
MODULES = ("registry", "workers")
HOOKS = Path(__file__).with_name("hooks.py")
SECRET_KEY = "a-secret-key-of-the-conformance-run"
ADAPTERS_ALONE = ("key_id", "job_id", "upload_id", "webhook_id", "delivery_id", "sha256", "tenant")
"""What a key that is limited to some adapters shares with the tenant's others."""


@dataclass(frozen=True)
class Caller:
    """Whose key asks. `hidden`: identifiers that must look like nothing to it. `answered`: operations that must have been answered."""

    name: str
    headers: Sequence[str]
    answered: int
    hidden: dict[str, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=60, help="of each of the two phases of each caller")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="one caller alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorary-conformance-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        settings = Settings(state_dir=folder, secret_key=SecretStr(SECRET_KEY), port=free_ports(1)[0])
        keys = world.prepare(settings)
        with _running(settings) as url:
            known = world.fill(url, keys, folder=folder)
            operations = _operations(url)
            for caller in _callers(keys, known):
                if options.only in caller.name:
                    _run(caller, options, url, kept=_kept(keys), operations=operations, folder=folder)


def _callers(keys: world.Keys, known: world.Known) -> list[Caller]:
    """Strangers first: the others delete what they meet."""
    in_tenant = [_bearer(keys.admin), f"X-Lorary-Tenant: {world.OWNER}"]
    return [
        Caller("neighbour", [_bearer(keys.neighbour)], 20, known.but()),
        Caller("limited key", [_bearer(keys.limited)], 20, known.but(*ADAPTERS_ALONE)),
        Caller("owner", [_bearer(keys.owner)], 40),
        Caller("admin in a tenant", in_tenant, 40),
        Caller("admin", [_bearer(keys.admin)], 15),
    ]


def _bearer(token: str) -> str:
    return f"Authorization: Bearer {token}"


def _kept(keys: world.Keys) -> list[str]:
    """The callers' own keys and tenants: whoever deletes them hears 401 from then on."""
    return [world.OWNER, world.NEIGHBOUR, *(token.split("_")[1] for token in vars(keys).values())]


def _operations(url: str) -> dict[str, list[str]]:
    """{operation: names of its path parameters}."""
    paths: dict[str, dict[str, Any]] = httpx2.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    return {
        f"{method.upper()} {path}": [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
        for path, methods in paths.items()
        for method, operation in methods.items()
    }


def _run(caller: Caller, options: argparse.Namespace, url: str, *, kept: list[str], operations: dict[str, list[str]], folder: Path) -> None:
    given, seen = folder / "given.json", folder / "seen"
    twins = {value: _twin(value) for name, value in caller.hidden.items() if name not in ("alias", "number", "path")}
    sentences = [world.MARKER] if twins else []
    secrets = [*sentences, *(value for name, value in caller.hidden.items() if name in world.MADE_BY_SERVER)]
    words = {"kept": kept, "seen": str(seen), "parameters": caller.hidden, "twins": twins, "sentences": sentences, "secrets": secrets}
    given.write_text(json.dumps(words))
    found: dict[str, set[str]] = defaultdict(set)
    for phases, least in PHASES.items():
        print(f"\n== {caller.name}: {phases} ==", flush=True)
        seen.unlink(missing_ok=True)
        _schemathesis(options, url, phases=phases, headers=caller.headers, given=given, folder=folder)
        called = _read(seen, into=found)
        print(f"{caller.name}, {phases}: {len(called)} of {len(operations)} operations were called")
        if len(called) < least * len(operations):
            raise SystemExit(f"too few; give it more --seconds. Not called: {sorted(set(operations) - called)}")
    _check(caller, found, owned={one for one, names in operations.items() if any(caller.hidden.get(name) in twins for name in names)})


def _read(seen: Path, *, into: dict[str, set[str]]) -> set[str]:
    """Adds what `hooks.py` noted; returns what was called."""
    noted: dict[str, set[str]] = defaultdict(set)
    for what, _, operation in (line.partition(" ") for line in seen.read_text().splitlines()):
        noted[what].add(operation)
        into[what].add(operation)
    return noted["called"]


def _check(caller: Caller, found: dict[str, set[str]], *, owned: set[str]) -> None:
    """A run in which nearly everything was refused, or nothing of the owner's was named, proves nothing."""
    answered = len(found["answered"])
    print(f"{caller.name}: {answered} operations were answered below 400, {len(found['compared'])} compared with nothing")
    if answered < caller.answered:
        raise SystemExit(f"at least {caller.answered} should have been answered")
    missed = {one for one in owned - found["compared"] if not one.endswith("/base-models/{name}")}
    if missed:
        raise SystemExit(f"nothing of {world.OWNER} was named to {sorted(missed)}")


def _twin(word: str) -> str:
    """A word of the same form and length that names nothing."""
    return "".join("0" if letter.isdigit() else "g" if letter > "f" else "e" for letter in word)


@contextmanager
def _running(settings: Settings) -> Iterator[str]:
    """The registry and a worker over one state directory; yields the URL."""
    given = {"STATE_DIR": settings.state_dir, "SECRET_KEY": SECRET_KEY, "PORT": settings.port, "LOG_LEVEL": "ERROR", "DRAIN_S": 5}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORARY_")}
    environment |= {f"LORARY_{name}": str(value) for name, value in given.items()}
    logs = [settings.state_dir / f"{module}.log" for module in MODULES]
    processes = [_start(module, environment, log) for module, log in zip(MODULES, logs, strict=True)]
    url = f"http://127.0.0.1:{settings.port}"
    try:
        wait_until(lambda: _answers(url), process=processes[0])
        yield url
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(timeout=60)
    if "Traceback" in (said := logs[0].read_text()):
        raise SystemExit(f"the registry logged an exception that no answer showed:\n{said[-8000:]}")


def _start(module: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=output, stderr=output)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/livez", timeout=5).status_code == 200
    except httpx2.TransportError:
        time.sleep(0.2)
        return False


def _schemathesis(options: argparse.Namespace, url: str, *, phases: str, headers: Sequence[str], given: Path, folder: Path) -> None:
    """Names with a pattern are rarely met by chance, which is no fault of the API: hence the health check that is off."""
    (folder / "schemathesis.toml").write_text(f"hooks = {json.dumps(str(HOOKS))}\n")
    command = [options.schemathesis.absolute(), "run", f"{url}/openapi.json", "--checks", CHECKS, "--phases", phases]
    command += ["--max-examples", "10", "--seed", str(options.seed), "--max-time", str(options.seconds), "--continue-on-failure"]
    command += ["--request-timeout", "20", "--warnings", "off", "--no-color", "--suppress-health-check", "filter_too_much"]
    for header in headers:
        command += ["--header", header]
    environment = os.environ | {"LORARY_CONFORMANCE": str(given)}
    limit_s = 3 * options.seconds + 300
    done = subprocess.run([str(part) for part in command], check=False, timeout=limit_s, cwd=folder, env=environment)
    if done.returncode != 0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
