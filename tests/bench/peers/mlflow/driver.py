"""Their side: `mlflow server` 3.18 on its default uvicorn, basic auth off, filled by SQL with the same models."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any, ClassVar

from tests.bench.registry.generator import request
from tests.bench.registry.world import PAGE, VERSIONS, World, base_environment, start
from tests.postgresql import PostgreSQL
from tests.servers import free_ports

HERE = Path(__file__).resolve().parent
API = "/api/2.0/mlflow"


def install(cache: Path) -> Path | None:
    """The environment's `mlflow`, or None where it cannot be built; says why."""
    venv = cache / "peers" / "mlflow"
    done = subprocess.run([HERE / "install.sh", venv], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"  mlflow is absent: {done.stderr.strip().splitlines()[-1:] or done.returncode}", flush=True)
        return None
    return venv / "bin" / "mlflow"


class MLflow:
    """The server as a process. Artifacts are not served: a version is a row that names a source, as its API has it."""

    name = "mlflow"
    statuses: ClassVar = {"create version": 200, "alias move": 200, "resolve": 200, "list": 200}

    def __init__(self, program: Path, server: PostgreSQL, database: str, folder: Path, world: World) -> None:
        self.world = world
        self.port = free_ports(1)[0]
        folder.mkdir(exist_ok=True)
        arguments = ["server", "--backend-store-uri", server.url(database), "--default-artifact-root", str(folder / "artifacts")]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", str(world.workers), "--no-serve-artifacts"]
        environment = base_environment() | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # no processes beside the server's workers
            "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "10",  # as ours
            "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "5",
            "HOME": str(folder),
            "PATH": f"{program.parent}:{base_environment().get('PATH', '')}",
        }
        url = f"http://127.0.0.1:{self.port}/health"
        self.process: subprocess.Popen[bytes] = start(
            [str(program), *arguments], environment=environment, log=folder / "mlflow.log", url=url
        )
        for statement in _rows(world.adapters):
            server.execute(statement, database=database)

    def requests(self, operation: str, *, client: int) -> Iterator[bytes]:
        names = self.world.names(client)
        if operation == "create version":
            return (
                self._post("/model-versions/create", {"name": name, "source": f"s3://bucket/{name}/{n}"}) for n, name in enumerate(names)
            )
        if operation == "alias move":
            share = len(range(client, self.world.adapters, self.world.clients))
            turns = (1 + (1 + step // share) % VERSIONS for step in count())
            bodies = ({"name": name, "alias": "prod", "version": str(turn)} for name, turn in zip(names, turns, strict=False))
            return (self._post("/registered-models/alias", body) for body in bodies)
        if operation == "resolve":
            return (self._get(f"/registered-models/alias?name={name}&alias=prod") for name in names)
        assert operation == "list", operation
        return cycle([self._get(f"/registered-models/search?max_results={PAGE}")])

    def _get(self, path: str) -> bytes:
        return request("GET", API + path, port=self.port)

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return request("POST", API + path, port=self.port, body=body)


def _rows(adapters: int) -> list[str]:
    numbers = f"generate_series(0, {adapters - 1}) AS n"
    name, now = "'adapter-' || lpad(n::text, 5, '0')", "extract(epoch FROM now())::bigint * 1000"
    return [
        f"""INSERT INTO registered_models (name, creation_time, last_updated_time, description)
            SELECT {name}, {now} + n, {now}, '' FROM {numbers}""",
        f"""INSERT INTO model_versions (name, version, creation_time, last_updated_time, description, current_stage, source, status)
            SELECT {name}, v, {now}, {now}, '', 'None', 's3://bucket/' || n, 'READY' FROM {numbers}, generate_series(1, {VERSIONS}) AS v""",
        f"""INSERT INTO registered_model_aliases (name, alias, version)
            SELECT {name}, a, 1 FROM {numbers}, (VALUES ('default'), ('prod')) AS t(a)""",
        "VACUUM ANALYZE",
    ]
