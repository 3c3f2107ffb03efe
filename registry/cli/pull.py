"""A version's files onto this machine: checked by sha256, all of them or none. What `lorary adapters pull` does."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.cli.client import Json, path
from registry.cli.failure import CliFailure
from registry.cli.output import Advance
from registry.cli.remote import Call

DEFAULT_ALIAS = "default"


def pull(call: Call, reference: str, *, directory: Path, force: bool) -> Json:
    """Write the version's files into `directory` and answer the version.

    Nothing is written unless every file arrived with its size and sha256. A file that is already there and differs
    stops the pull before the download, unless `force`.
    """
    name, number = resolve(call, reference)
    version = call.client.get(path("adapters", name, "versions", number))
    wanted = {_safe_name(entry["path"]): entry for entry in version["files"]}
    missing = {file: entry for file, entry in wanted.items() if not _has(directory / file, entry)}
    _refuse_overwrite(directory, missing, force=force)
    route = path("adapters", name, "versions", number, "files")
    with (
        _staging(directory) as staging,
        call.output.progress("downloading", total_bytes=sum(e["size"] for e in missing.values())) as advance,
    ):
        for file, entry in missing.items():
            _download(call, route + path(file), staging / file, entry, advance)
        _publish(staging, directory)
    call.output.note(f"{name}@{number} is in {directory}")
    return version


def resolve(call: Call, reference: str) -> tuple[str, int]:
    """Adapter name and version number of `name`, `name@3` or `name@alias`."""
    name, at, pointer = reference.partition("@")
    if not name or (at and not pointer):
        raise CliFailure(f"{reference!r} is not a reference", remedy="write NAME, NAME@3 or NAME@ALIAS")
    if pointer.isdecimal():
        return name, int(pointer)
    alias = call.client.get(path("adapters", name, "aliases", pointer or DEFAULT_ALIAS))
    return name, int(alias["version"])


def _safe_name(name: str) -> str:
    """A registry that we do not control names the files: none may leave the folder."""
    if not name or name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise CliFailure(f"the registry names a file {name!r}, which would leave the folder; nothing was written")
    return name


def _has(file: Path, entry: Json) -> bool:
    if not file.is_file() or file.stat().st_size != entry["size"]:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == str(entry["sha256"])


def _refuse_overwrite(directory: Path, missing: dict[str, Json], *, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise CliFailure(f"{directory} is not a folder", remedy="give another path")
    different = sorted(file for file in missing if (directory / file).exists())
    if different and not force:
        raise CliFailure(
            f"{directory} has other bytes under {', '.join(different)}", remedy="pull into another folder, or replace them with --force"
        )


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder beside the target, on the same disk, gone afterwards."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(call: Call, route: str, target: Path, entry: Json, advance: Advance) -> None:
    digest, size = hashlib.sha256(), 0
    with call.client.download(route) as chunks, target.open("xb") as file:
        for chunk in chunks:
            size += len(chunk)
            if size > entry["size"]:
                break  # whatever follows is not what was promised; do not fill the disk with it
            digest.update(chunk)
            file.write(chunk)
            advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if size != entry["size"] or digest.hexdigest() != entry["sha256"]:
        raise CliFailure(
            f"{target.name} arrived damaged ({size} of {entry['size']} bytes, sha256 {digest.hexdigest()})", remedy="pull again"
        )


def _publish(staging: Path, directory: Path) -> None:
    """A new folder appears in one rename; into an existing one each file is replaced in one."""
    if not directory.exists():
        staging.chmod(0o755)  # mkdtemp's 0700 is for the time of the download
        staging.rename(directory)
        return
    for file in staging.iterdir():
        file.replace(directory / file.name)
