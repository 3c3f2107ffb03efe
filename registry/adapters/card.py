"""The card of a version: who, from what, with what. Facts that Lorary knows, beside what the tenant wrote itself.

Most stand in rows. Scaling and dtype are read from config and header again: pushed bytes never change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from registry.adapters import alias_rows, service, signatures
from registry.adapters.models import AdapterVersion
from registry.adapters.schemas import CardBaseModel, CardImport, CardOut, CardPusher, CardReadme, FileOut, FormOut
from registry.artifact.errors import ArtifactRefused
from registry.artifact.gate import README_FILE
from registry.artifact.header import parse_header
from registry.artifact.lora import parse_config
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE
from registry.audit import repository as audit
from registry.base_models.schemas import Failure
from registry.blobs.store import BlobMissing, BlobStore
from registry.db import Database, ReadSession
from registry.tenants import repository as tenants

LICENSE_TAG = "license:"
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Known:
    """What rows say, read in one transaction."""

    version: AdapterVersion
    key_name: str | None
    aliases: list[str]
    imported: CardImport | None


@dataclass(frozen=True)
class Read:
    """What the files say; None where the store has lost them, which the version's next check will tell."""

    alpha: float | None = None
    use_rslora: bool | None = None
    dtype: str | None = None
    readme: CardReadme | None = None


def card_of(database: Database, store: BlobStore, tenant_id: str, name: str, number: int) -> CardOut:
    """Raises NotFound. No transaction is open while files are read."""
    with database.read() as session:
        known = _known(session, tenant_id, name, number)
    return _compose(known, _read(store, tenant_id, known.version))


def _known(session: ReadSession, tenant_id: str, name: str, number: int) -> Known:
    version = service.get_version(session, tenant_id, name, number)
    key = tenants.find_key(session, tenant_id, version.created_by)
    aliases = alias_rows.aliases(session, tenant_id, version.adapter_id, version_id=version.id)
    return Known(version, key.name if key else None, [alias.name for alias in aliases], _imported(session, tenant_id, version))


def _imported(session: ReadSession, tenant_id: str, version: AdapterVersion) -> CardImport | None:
    wanted = audit.Wanted(action="version.imported", resource_id=version.id)
    event = next(iter(audit.list_events(session, tenant_id, wanted, limit=1, cursor=None)), None)
    if event is None or event.after is None:
        return None
    told = {field: event.after.get(field) for field in ("endpoint", "repo", "revision", "commit")}
    return CardImport(**told, imported_at=event.created_at)


def _read(store: BlobStore, tenant_id: str, version: AdapterVersion) -> Read:
    files: dict[str, dict[str, Any]] = {file["path"]: file for file in version.manifest["files"]}
    try:
        config = parse_config(b"".join(store.stream(tenant_id, files[CONFIG_FILE]["sha256"])))
        with store.open(tenant_id, files[WEIGHTS_FILE]["sha256"]) as weights:
            header = parse_header(weights, file_size=files[WEIGHTS_FILE]["size"])
        readme = _readme(store, tenant_id, files.get(README_FILE))
    except (BlobMissing, ArtifactRefused):
        return Read()
    dtypes = sorted({tensor.dtype for tensor in header.tensors})
    return Read(config.alpha, config.use_rslora, ", ".join(dtypes), readme)


def _readme(store: BlobStore, tenant_id: str, file: dict[str, Any] | None) -> CardReadme | None:
    if file is None:
        return None
    data = b"".join(store.stream(tenant_id, file["sha256"]))
    return CardReadme(sha256=file["sha256"], size=file["size"], text=data.decode("utf-8", "replace"))


def _compose(known: Known, read: Read) -> CardOut:
    version, adapter, base = known.version, known.version.adapter, known.version.base_model
    return CardOut(
        adapter=adapter.name,
        description=adapter.description,
        tags=adapter.tags,
        license=_license(adapter.tags, read.readme),
        number=version.number,
        version_digest=version.version_digest,
        status=version.status,
        reason=Failure(**version.reason) if version.reason else None,
        aliases=known.aliases,
        pushed_by=CardPusher(key_id=version.created_by, key_name=known.key_name),
        pushed_at=version.created_at,
        imported_from=known.imported,
        base_model=CardBaseModel(name=base.name, base_digest=base.base_digest, upstream_names=base.upstream_names),
        rank=version.rank,
        alpha=read.alpha,
        use_rslora=read.use_rslora,
        targets=version.targets,
        dtype=read.dtype,
        num_params=version.num_params,
        size_bytes=version.size_bytes,
        files=[FileOut(**file) for file in version.manifest["files"]],
        forms=[FormOut(kind=form.kind, form_digest=form.form_digest, size_bytes=form.size_bytes) for form in version.forms],
        signature=signatures.describe(version),
        readme=read.readme,
    )


def _license(tags: list[str], readme: CardReadme | None) -> str | None:
    """As the Hub writes it: the tag `license:apache-2.0`, or `license: apache-2.0` in the README's front matter."""
    tagged = (tag.removeprefix(LICENSE_TAG) for tag in tags if tag.startswith(LICENSE_TAG))
    front = _FRONT_MATTER.match(readme.text.replace("\r\n", "\n")) if readme else None
    lines = front[1].split("\n") if front else []
    written = (line.removeprefix(LICENSE_TAG).strip(" \t\"'") for line in lines if line.startswith(LICENSE_TAG))
    return next((name for name in (*tagged, *written) if _LICENSE.fullmatch(name)), None)
