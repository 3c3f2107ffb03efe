"""The Hub's own routes, at the root, and `/imports`.

With `HF_ENDPOINT` set to this registry, huggingface_hub reads adapters from it.
An API key is the token, a repository is `tenant/adapter`. No path here can meet another route: the first part of a
repository is a tenant's name, and tenants may not be named api, v1, models, datasets, docs or metrics.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse

from registry.blobs import service as blobs
from registry.blobs.endpoints import BlobStoreDep, RangeHeader, SettingsDep, blob_response
from registry.db import ReadSessionDep, WriteSessionDep
from registry.errors import BadRequest, Forbidden, Invalid, problem_responses
from registry.hub import imports, service
from registry.hub.models import Commit, RepoFile
from registry.hub.schemas import (
    AccessToken,
    Auth,
    CardData,
    ImportAccepted,
    ImportIn,
    ModelOut,
    Sibling,
    SiblingLfs,
    TreeEntry,
    TreeLfs,
    WhoamiOut,
)
from registry.hub.service import MAIN, HubNotFound
from registry.routing import Route
from registry.tenants.auth import SubjectDep, TenantSubject, require

MAX_TREE_PAGE = 1000

router = APIRouter(prefix="/imports", tags=["hub"], route_class=Route)
hub_router = APIRouter(tags=["hub"], route_class=Route)

Reader = Annotated[TenantSubject, Depends(require("adapters:read"))]
Writer = Annotated[TenantSubject, Depends(require("adapters:write"))]
TreeLimit = Annotated[int, Query(ge=1, le=MAX_TREE_PAGE)]
TreeCursor = Annotated[str | None, Query(max_length=256, description="The last path of the page before; follow `Link` instead.")]

ERRORS = problem_responses(BadRequest, Forbidden, HubNotFound)


@router.post("", status_code=202, responses=problem_responses(BadRequest, Forbidden, Invalid))
def import_adapter(wanted: ImportIn, *, subject: Writer, session: WriteSessionDep, settings: SettingsDep) -> ImportAccepted:
    """A job copies one revision of a repository and pushes it, as if the tenant had: the gate decides as ever."""
    job, name = imports.request_import(session, subject, wanted, settings=settings)
    return ImportAccepted(job_id=job.id, adapter=name, repo=wanted.repo, revision=wanted.revision)


@hub_router.get("/api/whoami-v2")
def whoami(subject: SubjectDep) -> WhoamiOut:
    """Whose token this is."""
    name = subject.tenant or subject.key_id
    auth = Auth(access_token=AccessToken(display_name=subject.key_id))
    return WhoamiOut(id=subject.tenant_id or subject.key_id, name=name, fullname=name, auth=auth)


@hub_router.get("/api/models/{tenant}/{adapter}", responses=ERRORS)
def model_info(tenant: str, adapter: str, *, subject: Reader, session: ReadSessionDep) -> ModelOut:
    """The revision `main`."""
    return _show_model(service.commit_of(session, subject, tenant, adapter, revision=MAIN))


@hub_router.get("/api/models/{tenant}/{adapter}/revision/{revision:path}", responses=ERRORS)
def revision_info(tenant: str, adapter: str, revision: str, *, subject: Reader, session: ReadSessionDep) -> ModelOut:
    """`main`, an alias, a version number, or a digest."""
    return _show_model(service.commit_of(session, subject, tenant, adapter, revision=revision))


@hub_router.get("/api/models/{tenant}/{adapter}/tree/{revision}", responses=ERRORS)
def tree(
    tenant: str,
    adapter: str,
    revision: str,
    *,
    request: Request,
    response: Response,
    subject: Reader,
    session: ReadSessionDep,
    limit: TreeLimit = MAX_TREE_PAGE,
    cursor: TreeCursor = None,
) -> list[TreeEntry]:
    """Every file, page after page by `Link: <...>; rel="next"`."""
    commit = service.commit_of(session, subject, tenant, adapter, revision=revision)
    files = [file for file in commit.files if cursor is None or file.path > cursor]
    if len(files) > limit:
        following = request.url.include_query_params(cursor=files[limit - 1].path)
        response.headers["Link"] = f'<{following}>; rel="next"'
    return [_show_entry(file) for file in files[:limit]]


@hub_router.get("/api/models/{tenant}/{adapter}/tree/{revision}/{path:path}", responses=ERRORS)
def subtree(tenant: str, adapter: str, revision: str, path: str, *, subject: Reader, session: ReadSessionDep) -> list[TreeEntry]:
    """A folder's files. Versions have no folders, so that every path but the empty one is absent."""
    commit = service.commit_of(session, subject, tenant, adapter, revision=revision)
    if path.strip("/"):
        raise service.entry_not_found(commit)
    return [_show_entry(file) for file in commit.files]


@hub_router.head("/{tenant}/{adapter}/resolve/{revision}/{path:path}", responses=ERRORS)
def file_metadata(tenant: str, adapter: str, revision: str, path: str, *, subject: Reader, session: ReadSessionDep) -> Response:
    """Commit, size and sha256 (as `ETag`) of a file."""
    commit = service.commit_of(session, subject, tenant, adapter, revision=revision)
    file = service.file_of(commit, path)
    headers = {"Content-Length": str(file.size), "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    return Response(headers=headers | _file_headers(commit, file))


@hub_router.get("/{tenant}/{adapter}/resolve/{revision}/{path:path}", response_class=StreamingResponse, responses=ERRORS)
def get_file(
    tenant: str,
    adapter: str,
    revision: str,
    path: str,
    *,
    subject: Reader,
    session: ReadSessionDep,
    store: BlobStoreDep,
    byte_range: RangeHeader = None,
) -> Response:
    """A file's bytes as they were pushed. `Range` resumes a download that broke off."""
    commit = service.commit_of(session, subject, tenant, adapter, revision=revision)
    file = service.file_of(commit, path)
    blob = blobs.get(session, subject.tenant_id, file.sha256)
    response = blob_response(store, blob, byte_range=byte_range)
    response.headers.update(_file_headers(commit, file))
    return response


def _file_headers(commit: Commit, file: RepoFile) -> dict[str, str]:
    return {
        "ETag": f'"{file.sha256}"',
        "X-Repo-Commit": commit.sha,
        "X-Linked-Etag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
        "X-Content-Type-Options": "nosniff",
    }


def _show_model(commit: Commit) -> ModelOut:
    version, tags = commit.version, service.tags_of(commit)
    return ModelOut(
        id=commit.repo_id,
        model_id=commit.repo_id,
        author=commit.tenant,
        sha=commit.sha,
        version=version.number,
        version_digest=version.version_digest,
        created_at=version.adapter.created_at,
        last_modified=version.created_at,
        tags=tags,
        card_data=CardData(base_model=service.upstream_name(version.base_model), tags=tags),
        siblings=[_show_sibling(file) for file in commit.files],
        used_storage=version.size_bytes,
    )


def _show_sibling(file: RepoFile) -> Sibling:
    lfs = SiblingLfs(sha256=file.sha256, size=file.size, pointer_size=len(file.pointer))
    return Sibling(rfilename=file.path, size=file.size, blob_id=file.git_oid, lfs=lfs)


def _show_entry(file: RepoFile) -> TreeEntry:
    lfs = TreeLfs(oid=file.sha256, size=file.size, pointer_size=len(file.pointer))
    return TreeEntry(path=file.path, oid=file.git_oid, size=file.size, lfs=lfs)
