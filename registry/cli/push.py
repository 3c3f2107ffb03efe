"""Bytes first, then a version that names them: what `lorary adapters push` does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from registry.artifact.gate import SIGNATURE_FILE
from registry.cli.client import ApiProblem, Json, path
from registry.cli.failure import CliFailure
from registry.cli.jobs import poll
from registry.cli.output import Advance
from registry.cli.parts import upload_parts
from registry.cli.remote import Call
from registry.cli.sign import sign

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OPTIONAL = ("README.md", SIGNATURE_FILE)
CHUNK_BYTES = 2**20
INLINE_BYTES = 64 * 2**20  # above, parts: they go on where they stopped


@dataclass(frozen=True)
class Push:
    """What the new version is called and belongs to. None leaves the choice to the registry, and what is not signed unsigned."""

    name: str
    base_model: str | None = None
    sign_with: Path | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()

    def body(self, files: dict[str, str]) -> Json:
        given = {"base_model": self.base_model, "description": self.description, "tags": list(self.tags) or None}
        return {"files": files, **{field: value for field, value in given.items() if value is not None}}


@dataclass(frozen=True)
class LocalFile:
    """One file to push, as it was when it was hashed."""

    source: Path
    sha256: str
    size: int


def push(call: Call, asked: Push, *, directory: Path) -> Json:
    """Upload what the registry lacks and create the version; answers it as it then is (often pending).

    Raises CliFailure for a folder that is no PEFT adapter and for everything that the registry refuses.
    """
    chosen = _choose(call, directory)
    if asked.sign_with is not None:
        signature = sign(call.output, directory, chosen, key_file=asked.sign_with)
        chosen = [*(file for file in chosen if file.name != SIGNATURE_FILE), signature]
    files = _hash(call, chosen)
    _upload_absent(call, files)
    try:
        return _name(call, asked, files)
    except ApiProblem as problem:
        if problem.code == "blob_missing":  # bytes that nobody named for long were collected just now
            _upload_absent(call, files)
            return _name(call, asked, files)
        if problem.problem.get("field") == "base_model":
            problem.remedy = "name one with --base-model; `lorary base-models list` shows them"
        raise


def _name(call: Call, asked: Push, files: list[LocalFile]) -> Json:
    return call.client.post(path("adapters", asked.name, "versions"), asked.body({file.source.name: file.sha256 for file in files}))


def wait_until_settled(call: Call, name: str, number: int, *, timeout_s: float) -> Json:
    """The version once the gate has made it ready or rejected."""
    route = path("adapters", name, "versions", number)

    def look() -> Json | None:
        version = call.client.get(route)
        return version if version["status"] != "pending" else None

    with call.output.waiting(f"checking {name}@{number}"):
        return poll(look, timeout_s=timeout_s, what=f"the check of {name}@{number}")


def fail_if_rejected(name: str, version: Json) -> None:
    if version["status"] not in {"rejected", "deleted"}:
        return
    reason = version.get("reason") or {}
    raise CliFailure(
        f"{name}@{version['number']} was {version['status']}: {reason.get('detail', 'no reason given')}", code=reason.get("code")
    )


def _choose(call: Call, directory: Path) -> list[Path]:
    """The files of a PEFT folder that make a version; the rest is named on stderr and left where it is."""
    if not directory.is_dir():
        raise CliFailure(f"{directory} is not a folder", remedy=f"give the folder that holds {CONFIG} and {WEIGHTS}")
    for needed in (CONFIG, WEIGHTS):
        if not (directory / needed).is_file():
            raise CliFailure(f"{directory} has no {needed}", remedy=_missing_remedy(directory))
    chosen = [directory / name for name in (CONFIG, WEIGHTS, *OPTIONAL) if (directory / name).is_file()]
    for link in (file for file in chosen if file.is_symlink()):
        call.output.note(f"{link.name} is a link to {link.resolve()}; pushing what is there")
    left = sorted(entry.name for entry in directory.iterdir() if entry not in chosen)
    if left:
        call.output.note(f"not pushed, for it is no part of an adapter: {', '.join(left)}")
    return chosen


def _missing_remedy(directory: Path) -> str:
    if (directory / "adapter_model.bin").exists():
        return "adapter_model.bin is a pickle, which is never accepted: save again with model.save_pretrained(..., safe_serialization=True)"
    return "save the adapter with PEFT's model.save_pretrained(folder)"


def _hash(call: Call, files: list[Path]) -> list[LocalFile]:
    with call.output.progress("hashing", total_bytes=sum(file.stat().st_size for file in files)) as advance:
        return [_hash_one(file, advance) for file in files]


def _hash_one(source: Path, advance: Advance) -> LocalFile:
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(source, advance):
        digest.update(chunk)
        size += len(chunk)
    return LocalFile(source=source, sha256=digest.hexdigest(), size=size)


def _upload_absent(call: Call, files: list[LocalFile]) -> None:
    _upload(call, [file for file in _distinct(files) if not call.client.exists(path("blobs", file.sha256))])


def _upload(call: Call, files: list[LocalFile]) -> None:
    with call.output.progress("uploading", total_bytes=sum(file.size for file in files)) as advance:
        for file in files:
            _upload_one(call, file, advance)


def _upload_one(call: Call, file: LocalFile, advance: Advance) -> None:
    try:
        if file.size > INLINE_BYTES or not _upload_inline(call, file, advance):
            upload_parts(call, file.source, sha256=file.sha256, size=file.size, advance=advance)
    except ApiProblem as problem:
        if problem.status == 422:
            raise CliFailure(
                f"{file.source} changed while it was pushed: {problem.detail}", remedy="push again once nobody writes to it"
            ) from problem
        raise


def _upload_inline(call: Call, file: LocalFile, advance: Advance) -> bool:
    """False where the registry takes less at once than most do."""
    sent = 0

    def count(size: int) -> None:
        nonlocal sent
        sent += size
        advance(size)

    try:
        call.client.upload(path("blobs", file.sha256), _chunks(file.source, count), size=file.size)
    except ApiProblem as problem:
        if problem.status != 413:
            raise
        advance(-sent)
        return False
    return True


def _distinct(files: list[LocalFile]) -> list[LocalFile]:
    return list({file.sha256: file for file in files}.values())


def _chunks(source: Path, advance: Advance) -> Iterator[bytes]:
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            advance(len(chunk))
