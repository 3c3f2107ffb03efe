"""Rules of the Hub's read API: what a repository id and a revision mean, and how the Hub says that there is none.

    revision          meaning
    main              the alias `default`, as a plain name means it everywhere
    40 or 64 hex      a version digest or its first 40 digits, which is the commit id
    digits            a version number
    anything else     an alias

What is not ready, not alive or not the caller's does not exist.
"""

from __future__ import annotations

import re
from typing import ClassVar

from registry.adapters import repository as adapters
from registry.adapters.models import AdapterVersion
from registry.adapters.service import DEFAULT_ALIAS
from registry.base_models.models import BaseModelRevision
from registry.db import ReadSession
from registry.errors import NotFound
from registry.hub import repository
from registry.hub.models import Commit, RepoFile
from registry.tenants.auth import TenantSubject
from registry.text import NAME_PATTERN

MAIN = "main"
MAX_VERSION_DIGITS = 9

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class HubNotFound(NotFound):
    """A 404 that huggingface_hub turns into the exception its users know, by the header X-Error-Code."""

    hub_code: ClassVar[str]
    commit: str | None = None

    def headers(self) -> dict[str, str]:
        commit = {"X-Repo-Commit": self.commit} if self.commit else {}
        return super().headers() | {"X-Error-Code": self.hub_code} | commit


class RepoNotFound(HubNotFound):
    """Absent, deleted, or another tenant's: one answer."""

    code, hub_code = "repo_not_found", "RepoNotFound"


class RevisionNotFound(HubNotFound):
    code, hub_code = "revision_not_found", "RevisionNotFound"


class EntryNotFound(HubNotFound):
    """With the commit, so that clients remember that this commit has no such file."""

    code, hub_code = "entry_not_found", "EntryNotFound"


def commit_of(session: ReadSession, subject: TenantSubject, namespace: str, name: str, *, revision: str) -> Commit:
    """Raises RepoNotFound, RevisionNotFound."""
    if namespace != subject.tenant or re.fullmatch(NAME_PATTERN, name) is None:
        raise _repo_not_found()
    adapter = adapters.adapter(session, subject.tenant_id, name) if subject.may_name(name) else None
    if adapter is None:
        raise _repo_not_found()
    version = _version(session, subject.tenant_id, adapter.id, revision)
    if version is None:
        raise RevisionNotFound(
            "the repository has no such revision that is ready",
            field="revision",
            remedy="main, an alias, a version number, or a version digest or its first 40 digits",
        )
    return Commit(tenant=subject.tenant, version=version)


def file_of(commit: Commit, path: str) -> RepoFile:
    """Raises EntryNotFound."""
    for file in commit.files:
        if file.path == path:
            return file
    raise entry_not_found(commit)


def entry_not_found(commit: Commit) -> EntryNotFound:
    error = EntryNotFound("this revision has no such file or folder", field="path", remedy="list the revision's tree")
    error.commit = commit.sha
    return error


def tags_of(commit: Commit) -> list[str]:
    """The tenant's own tags after those by which the Hub finds adapters of a base model."""
    upstream = upstream_name(commit.version.base_model)
    found = ["peft", "safetensors", "lora", f"base_model:{upstream}", f"base_model:adapter:{upstream}", *commit.version.adapter.tags]
    return list(dict.fromkeys(found))


def upstream_name(base_model: BaseModelRevision) -> str:
    """The base model's name in the world outside, or ours where it has none."""
    return base_model.upstream_names[0] if base_model.upstream_names else base_model.name


def _version(session: ReadSession, tenant_id: str, adapter_id: str, revision: str) -> AdapterVersion | None:
    if revision == MAIN:
        return repository.by_alias(session, tenant_id, adapter_id, DEFAULT_ALIAS)
    if _COMMIT.fullmatch(revision) is not None:
        return repository.by_digest(session, tenant_id, adapter_id, revision)
    if re.fullmatch(NAME_PATTERN, revision) is None:
        return None
    if revision.isdigit():
        number = int(revision) if len(revision) <= MAX_VERSION_DIGITS else 0
        return repository.by_number(session, tenant_id, adapter_id, number)
    return repository.by_alias(session, tenant_id, adapter_id, revision)


def _repo_not_found() -> RepoNotFound:
    return RepoNotFound("there is no such repository", field="repo_id", remedy="<tenant>/<adapter>, both of the key that you send")
