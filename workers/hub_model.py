"""A base model from a hub, into a folder of this machine: the files that a replica reads, each whole and as announced.

A download that breaks off goes on where it stopped, also in the next attempt and in the next job: the folder belongs to
the commit, not to the job, and one process at a time holds its lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.artifact.base import BaseSpec
from registry.artifact.errors import printable
from registry.artifact.header import parse_header
from registry.artifact.strict_json import load_object
from registry.base_models.hub_source import HubLocation
from registry.config import Settings
from registry.db import Database, reaching_tenant
from registry.errors import RegistryError, Unavailable
from registry.jobs import service as jobs
from registry.jobs.service import Claim, StaleFence
from registry.outbound import OutboundClient, OutboundFailed, make_outbound_client
from registry.sealing import Sealer, make_sealer
from registry.secrets import service as secrets
from workers.hub_fetch import Fetch
from workers.hub_source import HubCommit, HubFile, HubSource
from workers.importing import ImportRefused
from workers.progress import Progress
from workers.shell import Attempt

CONFIG, TOKENIZER, WEIGHTS, INDEX = "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SMALL_BYTES = 64 * 2**20
PARTIAL_TTL_S = 7 * 86_400.0
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")


@dataclass(frozen=True)
class HubDownload:
    """Files of one commit of a hub, for the job of kind `import_base_model`."""

    database: Database
    outbound: OutboundClient
    sealer: Sealer | None
    model_dir: Path
    max_bytes: int
    timeout_s: float

    @contextmanager
    def folder(self, claim: Claim, attempt: Attempt) -> Iterator[Path]:
        """The model's folder, locked while the block runs. Whoever moves it away keeps it; what is refused is removed.

        Raises ImportRefused for a repository that will never do, OutboundFailed for a hub to try again.
        """
        try:
            with self._locked(claim) as (source, commit, folder):
                try:
                    self._fill(source, commit, folder, claim=claim, attempt=attempt)
                    yield folder
                except OutboundFailed:
                    raise  # what has come stays for the next attempt
                except (ImportRefused, ValueError):
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                shutil.rmtree(folder, ignore_errors=True)  # where the same model was there already
        except (StaleFence, ImportRefused):
            raise
        except RegistryError as refused:
            if refused.status >= 500:
                raise
            raise ImportRefused(refused.error_code, refused.detail) from refused

    @contextmanager
    def _locked(self, claim: Claim) -> Iterator[tuple[HubSource, HubCommit, Path]]:
        wanted: Mapping[str, Any] = claim.payload["source"]
        where = HubLocation.parse(wanted["location"])
        endpoint, token = wanted.get("endpoint"), self._token(claim)
        source = HubSource(self.outbound, endpoint=endpoint, repo=where.repo, token=token, timeout_s=self.timeout_s)
        commit = source.commit(where.revision)
        self.model_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.model_dir)
        key = hashlib.sha256(f"{endpoint or ''}|{where.repo}|{commit.sha}".encode()).hexdigest()[:32]
        with _lock(self.model_dir / f".hub-{key}") as folder:
            yield source, commit, folder

    def _fill(self, source: HubSource, commit: HubCommit, folder: Path, *, claim: Claim, attempt: Attempt) -> None:
        """Small files first: they can refuse the model before gigabytes come."""
        listed = {file.path: file for file in commit.files}
        small = _small_files(listed)
        progress = Progress(lambda values: self._tell(claim, values), total_bytes=sum(file.size for file in small))
        fetch = Fetch(source, commit, folder, progress, attempt)
        for file in small:
            fetch.file(file)
        BaseSpec.from_config(load_object((folder / CONFIG).read_bytes(), field=CONFIG))
        placed = _weight_map(folder)
        shards = _shards(listed, placed)
        progress.total_bytes += sum(file.size for file in shards)
        self._require_room(folder, progress)
        for file in shards:
            fetch.file(file)
        if placed is not None:
            _require_index(folder, placed)
        (folder / INDEX).unlink(missing_ok=True)  # readers go by the shards' own headers

    def _require_room(self, folder: Path, progress: Progress) -> None:
        if progress.total_bytes > self.max_bytes:
            detail = f"its files have {progress.total_bytes} bytes, at most {self.max_bytes} are taken (LORARY_MAX_BASE_MODEL_BYTES)"
            raise ImportRefused("file_too_large", detail)
        there = sum(file.stat().st_size for file in folder.iterdir())
        missing, free = progress.total_bytes - there, shutil.disk_usage(folder).free
        if missing > free:
            raise ImportRefused("disk_full", f"{missing} bytes are still to come, and {self.model_dir} has room for {free}; make room")

    def _token(self, claim: Claim) -> str | None:
        name, tenant_id = claim.payload["source"].get("token_secret"), claim.payload.get("secret_tenant_id")
        if name is None:
            return None
        assert tenant_id is not None, "a secret is named together with its tenant"
        if self.sealer is None:
            raise Unavailable("this worker has no LORARY_SECRET_KEY, so it cannot open the token; another worker may", retry_after_s=30)
        with reaching_tenant(tenant_id), self.database.read() as session:
            return secrets.value_of(session, tenant_id, name, sealer=self.sealer)

    def _tell(self, claim: Claim, values: Mapping[str, Any]) -> None:
        with self.database.write() as session:
            jobs.progress(session, claim, values)


def make_hub_download(settings: Settings, database: Database) -> HubDownload:
    return HubDownload(
        database=database,
        outbound=make_outbound_client(settings),
        sealer=make_sealer(settings) if settings.secret_key.get_secret_value() else None,
        model_dir=settings.model_dir,
        max_bytes=settings.max_base_model_bytes,
        timeout_s=settings.import_timeout_s,
    )


def _small_files(listed: Mapping[str, HubFile]) -> list[HubFile]:
    """Raises ImportRefused where one is missing without which nothing is served, or one is far too large."""
    for needed in (CONFIG, TOKENIZER):
        if needed not in listed:
            remedy = "name a repository of transformers whose tokenizer is a fast one"
            raise ImportRefused("hub_no_model", f"the repository has no {needed}; {remedy}")
    found = [listed[path] for path in (CONFIG, TOKENIZER, INDEX, *OPTIONAL) if path in listed]
    for file in found:
        if file.size > SMALL_BYTES:
            raise ImportRefused("file_too_large", f"{file.path} has {file.size} bytes, at most {SMALL_BYTES} are taken")
    return found


def _weight_map(folder: Path) -> dict[str, str] | None:
    """{tensor: shard} of the index; None where the weights are one file. Raises ImportRefused."""
    if not (folder / INDEX).is_file():
        return None
    placed = load_object((folder / INDEX).read_bytes(), field=INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ImportRefused("hub_no_model", f"{INDEX} has no weight_map")
    for shard in set(map(str, placed.values())):
        if _SHARD.fullmatch(shard) is None:
            raise ImportRefused("hub_no_model", f"{INDEX} names the shard {printable(shard)}, which is no plain *.safetensors")
    return {str(tensor): str(shard) for tensor, shard in placed.items()}


def _shards(listed: Mapping[str, HubFile], placed: Mapping[str, str] | None) -> list[HubFile]:
    names = [WEIGHTS] if placed is None else sorted(set(placed.values()))
    for name in names:
        if name not in listed:
            raise ImportRefused("hub_no_model", f"the repository has no {printable(name)}; weights are taken as safetensors alone")
    return [listed[name] for name in names]


def _require_index(folder: Path, placed: Mapping[str, str]) -> None:
    """Every shard holds exactly the tensors that the index promises of it."""
    for shard in sorted(set(placed.values())):
        file = folder / shard
        with file.open("rb") as opened:
            there = set(parse_header(opened, file_size=file.stat().st_size).by_name)
        promised = {tensor for tensor, name in placed.items() if name == shard}
        if there != promised:
            odd = printable(min(there ^ promised))
            raise ImportRefused("bad_base_model", f"{shard} and {INDEX} disagree, for example about the tensor {odd}")


@contextmanager
def _lock(folder: Path) -> Iterator[Path]:
    """The folder, for this process alone. Raises Unavailable where another one has it: it is tried again later."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = folder.stat().st_ino == os.fstat(descriptor).st_ino  # the one before may have moved it away
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        if not is_there:
            raise Unavailable("another worker downloads these very files", retry_after_s=30)
        yield folder
    finally:
        os.close(descriptor)


def _remove_abandoned(model_dir: Path) -> None:
    """Downloads that nobody has gone on with for a week."""
    for folder in model_dir.glob(".hub-*"):
        try:
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > PARTIAL_TTL_S:
                with _lock(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        except (FileNotFoundError, Unavailable):
            continue
