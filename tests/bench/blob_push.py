"""Push through Lorary beside the raw S3 calls that a push cannot do without, in one run on a real SeaweedFS.

    python -m tests.bench.blob_push [--rounds 5] [--large-mib 192]

Prints medians and two ratios: PUT of 64 MiB through the API / one S3 PUT of it (bar 1.5), and an upload in parts with
its finalising / a raw multipart upload (bar 2.5). Rounds alternate, so both see the same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from registry.app import create_app
from registry.audit.service import record
from registry.blobs.service import open_blob_store
from registry.cli.client import RegistryClient, path
from registry.cli.output import Output
from registry.cli.parts import PARTS_AT_ONCE, upload_parts
from registry.cli.remote import Call
from registry.config import Settings
from registry.db import Database
from registry.jobs.service import FINALISE_UPLOAD
from registry.logging import configure_logging
from registry.models import metadata
from registry.tenants import service
from registry.tenants.auth import SYSTEM
from registry.tenants.keys import TENANT_SCOPES, KeyHasher
from tests.registry.conftest import SECRET_KEY, serve
from tests.registry.places import make_place, s3_settings
from tests.servers import S3_BUCKET, S3Server
from workers.finalise import UploadFinaliser
from workers.shell import JobKind, Worker

MIB = 1 << 20
INLINE_MIB, PART_MIB = 64, 16


@dataclass(frozen=True)
class Pushed:
    """Median seconds of a push and of the raw calls that it cannot do without; `bar`: how many times those it may take."""

    name: str
    ours_s: float
    raw_s: float
    bar: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.raw_s


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--large-mib", type=int, default=192)
    options = arguments.parse_args()
    configure_logging(format="json", level="WARNING")
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; medians of {options.rounds} rounds")
    for one in run(rounds=options.rounds, large_mib=options.large_mib):
        print(f"{one.name}: {one.ours_s:.2f} s / {one.raw_s:.2f} s = {one.ratio:.2f} (bar {one.bar})")


def run(*, rounds: int, large_mib: int) -> list[Pushed]:
    """Both comparisons, on a store of their own."""
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        server.start()
        try:
            return _measure(server, Path(folder), rounds=rounds, large=large_mib * MIB)
        finally:
            server.kill()


def _measure(server: S3Server, folder: Path, *, rounds: int, large: int) -> list[Pushed]:
    settings = Settings(
        state_dir=folder / "state",
        secret_key=SecretStr(SECRET_KEY),
        blob_url=make_place(server).url,
        s3=s3_settings(server),
        upload_part_bytes=PART_MIB * MIB,
    )
    settings.state_dir.mkdir()
    database = Database(settings.resolved_database_url)
    metadata.create_all(database.engine)
    token, stop = _tenant(database), threading.Event()
    worker = threading.Thread(target=_worker(settings, database).run, args=(stop,))
    worker.start()
    with serve(create_app(settings)) as url, RegistryClient(url, token=token) as client:
        call = Call(client=client, output=Output(), state_dir=folder)
        inline, name = INLINE_MIB * MIB, f"upload of {large // MIB} MiB in parts / raw multipart"
        push, raw_put = partial(_push, client), partial(_raw_put, server)
        pushed = [_compare("push of 64 MiB / raw PUT", push, raw_put, size=inline, rounds=rounds, bar=1.5)]
        parts, raw_parts = partial(_push_parts, call, folder), partial(_raw_multipart, server)
        pushed.append(_compare(name, parts, raw_parts, size=large, rounds=rounds, bar=2.5))
    stop.set()
    worker.join()
    database.close()
    return pushed


def _compare(name: str, ours: Callable[[bytes], None], raw: Callable[[bytes], None], *, size: int, rounds: int, bar: float) -> Pushed:
    times: dict[str, list[float]] = {"ours": [], "raw": []}
    for number in range(rounds + 1):
        for who, act in (("ours", ours), ("raw", raw)):
            data = os.urandom(size)
            started = time.perf_counter()
            act(data)
            if number:  # the first round warms both
                times[who].append(time.perf_counter() - started)
    return Pushed(name, statistics.median(times["ours"]), statistics.median(times["raw"]), bar)


def _push(client: RegistryClient, data: bytes) -> None:
    sha256 = hashlib.sha256(data).hexdigest()  # a client hashes first: it is part of a push
    chunks = (data[start : start + MIB] for start in range(0, len(data), MIB))
    client.upload(path("blobs", sha256), chunks, size=len(data))


def _push_parts(call: Call, folder: Path, data: bytes) -> None:
    file = folder / "large"
    file.write_bytes(data)
    upload_parts(call, file, sha256=hashlib.sha256(data).hexdigest(), size=len(data), advance=lambda _: None)


def _raw_put(server: S3Server, data: bytes) -> None:
    server.client.put_object(Bucket=S3_BUCKET, Key=f"raw/{time.time_ns()}", Body=data)


def _raw_multipart(server: S3Server, data: bytes) -> None:
    client, key = server.client, f"raw/{time.time_ns()}"
    upload_id = client.create_multipart_upload(Bucket=S3_BUCKET, Key=key)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        part = data[(number - 1) * PART_MIB * MIB : number * PART_MIB * MIB]
        answer = client.upload_part(Bucket=S3_BUCKET, Key=key, UploadId=upload_id, PartNumber=number, Body=part)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        parts = list(pool.map(send, range(1, -(-len(data) // (PART_MIB * MIB)) + 1)))
    client.complete_multipart_upload(Bucket=S3_BUCKET, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts})


def _tenant(database: Database) -> str:
    with database.system_write() as session:
        tenant = service.create_tenant(session, subject=SYSTEM, name="bench", record=record)
        scopes = sorted(TENANT_SCOPES)
        _key, token = service.issue_key(
            session,
            subject=SYSTEM,
            tenant_id=tenant.id,
            name="bench",
            scopes=scopes,
            expires_at=None,
            hasher=KeyHasher(SECRET_KEY),
            record=record,
        )
    return token


def _worker(settings: Settings, database: Database) -> Worker:
    finaliser = UploadFinaliser(database, open_blob_store(settings))
    kinds = {FINALISE_UPLOAD: JobKind(run=finaliser.run, give_up=finaliser.give_up)}
    return Worker(database, kinds=kinds, lease_s=settings.job_lease_s, poll_s=settings.job_poll_s)


if __name__ == "__main__":
    main()
