"""One repository of one hub: huggingface_hub's own words, addresses and errors over the guarded client.

The library speaks the protocol, but not over its own connections: those have no size limit, follow redirects into the
operator's network, and would send the worker's own token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

import httpx2

from registry.artifact.digest import is_digest
from registry.artifact.errors import printable
from registry.outbound import Caps, OutboundClient, OutboundFailed
from workers.importing import ImportRefused

LISTING_CAPS = Caps(total_s=30.0, max_bytes=8 * 2**20, max_redirects=3)
MAX_REDIRECTS = 5
RETRIED = frozenset({408, 425, 429})


@dataclass(frozen=True)
class HubFile:
    """As the hub announces it. `sha256` is None for small files, which it keeps in git under `git_oid` (sha1 of the blob)."""

    path: str
    size: int
    sha256: str | None
    git_oid: str | None = None


@dataclass(frozen=True)
class HubCommit:
    sha: str
    files: tuple[HubFile, ...]


class HubSource:
    """Reads a repository. `endpoint` None: the library's own default. Raises ImportRefused, OutboundRefused, OutboundFailed."""

    def __init__(self, outbound: OutboundClient, *, endpoint: str | None, repo: str, token: str | None, timeout_s: float) -> None:
        from huggingface_hub import constants  # noqa: PLC0415 - a second of imports that no other job needs
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415
            HFValidationError,
            build_hf_headers,
            validate_repo_id,
        )

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ImportRefused("hub_repo_invalid", printable(str(error))) from error
        self._outbound = outbound
        self._endpoint = endpoint or constants.ENDPOINT
        self._repo = repo
        self._headers = build_hf_headers(token=token or False, library_name="lorary")
        self._timeout_s = timeout_s

    def commit(self, revision: str) -> HubCommit:
        """The commit that the revision is now, with sizes and digests of its files."""
        url = f"{self._endpoint}/api/models/{self._repo}/revision/{quote(revision, safe='')}?blobs=true"
        answer = self._outbound.request("GET", url, headers=self._headers, caps=LISTING_CAPS)
        self._raise_for_status(answer.status, answer.headers)
        try:
            return _read_commit(json.loads(answer.body))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ImportRefused("hub_unreadable", "the hub's description of the repository cannot be read") from error

    @contextmanager
    def open(self, commit: HubCommit, file: HubFile, *, start: int = 0) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Where the bytes begin, and the bytes, no more than were announced. They begin at 0 where a hub ignores `start`."""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        url = hf_hub_url(self._repo, file.path, revision=commit.sha, endpoint=self._endpoint)
        caps = Caps(total_s=self._timeout_s, max_bytes=file.size, max_redirects=MAX_REDIRECTS)
        wanted = {"range": f"bytes={start}-"} if start else {}
        with self._outbound.stream("GET", url, headers=self._headers | wanted, caps=caps) as answer:
            if start and answer.status == httpx2.codes.PARTIAL_CONTENT:
                if not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                    raise OutboundFailed("protocol", f"the hub answered with another range of {file.path}")
                yield start, answer.chunks()
                return
            self._raise_for_status(answer.status, answer.headers)
            yield 0, answer.chunks()

    def _raise_for_status(self, status: int, headers: Mapping[str, str]) -> None:
        """By the library's own reading of the hub's error headers."""
        from huggingface_hub.errors import (  # noqa: PLC0415
            EntryNotFoundError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # noqa: PLC0415

        told = {name: headers[name] for name in ("x-error-code", "x-error-message") if name in headers}
        url = f"{self._endpoint}/api/models/{self._repo}"
        response = httpx2.Response(status, headers=told, request=httpx2.Request("GET", url))
        try:
            hf_raise_for_status(response)
        except RevisionNotFoundError as error:
            raise ImportRefused("hub_revision_not_found", f"{self._repo} has no such revision") from error
        except RepositoryNotFoundError as error:
            detail = f"the hub shows no repository {self._repo}; a private or gated one needs token_secret, with a token that may read it"
            raise ImportRefused("hub_repo_not_found", detail) from error
        except EntryNotFoundError as error:
            raise ImportRefused("hub_file_not_found", f"{self._repo} has lost a file while it was read") from error
        except HfHubHTTPError as error:
            if status >= 500 or status in RETRIED:
                raise OutboundFailed("protocol", f"the hub answered {status}") from error
            said = printable(told.get("x-error-message", ""))
            raise ImportRefused("hub_refused", f"the hub answered {status} for {self._repo}: {said}") from error
        if status != httpx2.codes.OK:
            raise OutboundFailed("protocol", f"the hub answered {status}")


def _read_commit(body: object) -> HubCommit:
    from huggingface_hub.hf_api import ModelInfo  # noqa: PLC0415

    if not isinstance(body, dict):
        raise TypeError("not an object")
    info = ModelInfo(**body)  # type: ignore[no-untyped-call]
    if not isinstance(info.sha, str) or len(info.sha) != 40 or not info.sha.isalnum():
        raise ValueError("no commit")
    files = []
    for sibling in info.siblings or ():
        size = sibling.lfs.size if sibling.lfs else sibling.size
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if not isinstance(sibling.rfilename, str) or type(size) is not int or size < 0 or (sha256 is not None and not is_digest(sha256)):
            raise ValueError("a file without size or with a digest that is none")
        git_oid = sibling.blob_id if sha256 is None and isinstance(sibling.blob_id, str) else None
        files.append(HubFile(sibling.rfilename, size, sha256, git_oid))
    return HubCommit(info.sha, tuple(files))
