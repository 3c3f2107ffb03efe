"""The Hub's read API under the Hub's own client, over real HTTP."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from tests.registry.adapters.pushing import Pusher, adapter, nan_adapter
from tests.registry.conftest import MakeKey
from tests.registry.hub.conftest import FILES, NEWER, Reader

Versions = list[dict[str, Any]]
WEIGHTS = "adapter_model.safetensors"


@dataclass
class BreakingStore:
    """The real store, whose first stream ends in an input/output error."""

    store: Any
    after: int
    asked: list[tuple[int, int]] = field(default_factory=list)

    def stream(self, tenant_id: str, sha256: str, *, start: int = 0, length: int) -> Iterator[bytes]:
        self.asked.append((start, length))
        chunks = self.store.stream(tenant_id, sha256, start=start, length=length)
        return self._broken(chunks) if len(self.asked) == 1 else chunks

    def _broken(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield next(chunks)[: self.after]
        raise OSError(errno.EIO, "the disk fails")


class TestDownload:
    def test_a_snapshot_is_the_pushed_bytes(self, reader: Reader) -> None:
        assert reader.snapshot("acme/pirate") == NEWER
        assert reader.snapshot("acme/pirate", revision="prod") == FILES

    def test_every_spelling_of_a_revision(self, reader: Reader, pirate: Versions) -> None:
        digest = pirate[0]["version_digest"]
        spellings = {None: 2, "main": 2, "default": 2, "prod": 1, "1": 1, "2": 2, digest[:40]: 1, digest: 1}
        for revision, number in spellings.items():
            info = reader.api.model_info("acme/pirate", revision=revision)
            assert info.sha == pirate[number - 1]["version_digest"][:40]
            assert reader.file("acme/pirate", WEIGHTS, revision=revision) == (FILES, NEWER)[number - 1][WEIGHTS]

    def test_one_file_comes_from_the_commit_that_was_resolved(self, reader: Reader) -> None:
        path = reader.api.hf_hub_download("acme/pirate", "README.md", revision="prod", cache_dir=reader.cache)
        assert reader.api.model_info("acme/pirate", revision="prod").sha in path

    def test_a_download_that_breaks_off_is_resumed(self, reader: Reader, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
        """The connection dies after 1000 bytes; the client, which counts in whole chunks of its own, asks for the rest alone."""
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
        data = FILES[WEIGHTS]
        app.state.blob_store = store = BreakingStore(app.state.blob_store, after=1000)
        assert reader.file("acme/pirate", WEIGHTS, revision="prod") == data
        assert store.asked == [(0, len(data)), (1000, len(data) - 1000)]

    def test_checksums_verify(self, reader: Reader) -> None:
        folder = reader.api.snapshot_download("acme/pirate", revision="prod", cache_dir=reader.cache)
        result = reader.api.verify_repo_checksums("acme/pirate", revision="prod", cache_dir=reader.cache)
        assert (result.checked_count, result.mismatches, result.missing_paths) == (3, [], [])
        target = (reader.cache / folder / WEIGHTS).resolve()
        target.write_bytes(FILES[WEIGHTS][:-1] + b"\xff")
        damaged = reader.api.verify_repo_checksums("acme/pirate", revision="prod", cache_dir=reader.cache)
        assert [mismatch["path"] for mismatch in damaged.mismatches] == [WEIGHTS]

    def test_an_alias_that_moves_is_a_new_commit(self, reader: Reader, acme: Pusher) -> None:
        assert reader.snapshot("acme/pirate", revision="prod") == FILES
        assert acme.put_alias("pirate", "prod", 2, **{"If-Match": '"1"'}).status_code == 200
        assert reader.snapshot("acme/pirate", revision="prod") == NEWER


class TestListing:
    def test_files_of_a_revision(self, reader: Reader) -> None:
        assert reader.api.list_repo_files("acme/pirate", revision="1") == sorted(FILES)
        assert reader.api.file_exists("acme/pirate", WEIGHTS)
        assert not reader.api.file_exists("acme/pirate", "README.md"), "the newer version has none"
        assert reader.api.repo_exists("acme/pirate")
        assert reader.api.revision_exists("acme/pirate", "prod")

    def test_the_tree_names_sizes_and_digests(self, reader: Reader) -> None:
        entries = {entry.path: entry for entry in reader.api.list_repo_tree("acme/pirate", revision="1", recursive=True)}
        assert {path: (entry.size, entry.lfs.sha256) for path, entry in entries.items()} == {
            path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in FILES.items()
        }

    def test_the_git_ids_are_gits(self, reader: Reader) -> None:
        entry = next(entry for entry in reader.api.list_repo_tree("acme/pirate", revision="1") if entry.path == WEIGHTS)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry.lfs.sha256}\nsize {entry.size}\n".encode()
        assert entry.lfs.pointer_size == len(pointer)
        assert entry.blob_id == hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()

    def test_pages_follow_link_headers(self, http: httpx2.Client) -> None:
        url, paths, pages = "/api/models/acme/pirate/tree/1?recursive=true&limit=2", [], 0
        while url:
            response = http.get(url)
            paths += [entry["path"] for entry in response.json()]
            url, pages = response.links.get("next", {}).get("url"), pages + 1
        assert (paths, pages) == (sorted(FILES), 2)

    def test_a_model_says_what_it_is_an_adapter_of(self, reader: Reader, acme: Pusher, pirate: Versions) -> None:
        acme.call("PATCH", "/adapters/pirate", json={"tags": ["sea"]})
        info = reader.api.model_info("acme/pirate", files_metadata=True)
        upstream = acme.get("/base-models/tiny")["upstream_names"][0]
        assert (info.id, info.author, info.private, info.library_name) == ("acme/pirate", "acme", True, "peft")
        assert {f"base_model:adapter:{upstream}", "sea"} <= set(info.tags or [])
        assert info.card_data is not None
        assert info.card_data.base_model == upstream
        assert {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings or [] if sibling.lfs} == {
            path: hashlib.sha256(data).hexdigest() for path, data in NEWER.items()
        }

    def test_who_am_i(self, reader: Reader) -> None:
        assert reader.api.whoami()["name"] == "acme"


class TestWhatIsNotThere:
    def test_repositories(self, reader: Reader, http: httpx2.Client) -> None:
        for repo in ("acme/ghost", "globex/pirate", "api/pirate", "models/pirate", "acme/PIRATE"):
            with pytest.raises(RepositoryNotFoundError):
                reader.api.model_info(repo)
            with pytest.raises(RepositoryNotFoundError):
                reader.file(repo, WEIGHTS)
        for repo in ("acme/pi%00rate", "acme/" + "x" * 5000, "v1/pirate", "%C3%BC/pirate"):
            assert http.get(f"/api/models/{repo}").headers["X-Error-Code"] == "RepoNotFound"

    def test_revisions(self, reader: Reader) -> None:
        for revision in ("3", "0", "9" * 30, "staging", "refs/pr/1", "a" * 40, "b" * 64, "MAIN", "\0", "a'b"):
            with pytest.raises(RevisionNotFoundError):
                reader.api.model_info("acme/pirate", revision=revision)
            if "/" not in revision:
                with pytest.raises(RevisionNotFoundError):
                    list(reader.api.list_repo_tree("acme/pirate", revision=revision))
        with pytest.raises(RevisionNotFoundError):
            reader.file("acme/pirate", WEIGHTS, revision="staging")

    def test_files(self, reader: Reader, http: httpx2.Client) -> None:
        for path in ("absent.bin", "..%2f..%2fsecret.key", "folder/x", "%00", ""):
            response = http.head(f"/acme/pirate/resolve/1/{path}")
            assert (response.status_code, response.headers["X-Error-Code"]) == (404, "EntryNotFound")
            assert len(response.headers["X-Repo-Commit"]) == 40
        with pytest.raises(RemoteEntryNotFoundError):
            reader.file("acme/pirate", "absent.bin")
        with pytest.raises(RemoteEntryNotFoundError):
            list(reader.api.list_repo_tree("acme/pirate", path_in_repo="folder"))

    def test_versions_that_are_not_ready(self, reader: Reader, acme: Pusher, work: Callable[[], int]) -> None:
        digests = [acme.push("pirate", files).json()["version_digest"] for files in (nan_adapter(7), adapter(8))]
        for revision in ("3", "4", *(digest[:40] for digest in digests)):
            with pytest.raises(RevisionNotFoundError):
                reader.api.model_info("acme/pirate", revision=revision)
        work()
        with pytest.raises(RevisionNotFoundError):
            reader.api.model_info("acme/pirate", revision="3")
        assert reader.api.model_info("acme/pirate", revision="4").sha == digests[1][:40]

    def test_what_was_deleted(self, reader: Reader, acme: Pusher, pirate: Versions) -> None:
        commit = pirate[0]["version_digest"][:40]
        assert acme.call("DELETE", "/adapters/pirate/versions/1").status_code == 204
        for revision in ("1", "prod", commit):
            with pytest.raises(RevisionNotFoundError):
                reader.api.model_info("acme/pirate", revision=revision)
        assert acme.call("DELETE", "/adapters/pirate").status_code == 204
        with pytest.raises(RepositoryNotFoundError):
            reader.api.model_info("acme/pirate")

    def test_an_adapter_without_a_ready_version_has_no_main(self, reader: Reader, acme: Pusher) -> None:
        acme.push("fresh", adapter(9))
        with pytest.raises(RevisionNotFoundError):
            reader.api.model_info("acme/fresh")

    def test_ranges_beyond_the_end(self, http: httpx2.Client) -> None:
        response = http.get(f"/acme/pirate/resolve/1/{WEIGHTS}", headers={"Range": "bytes=999999999-"})
        assert (response.status_code, response.json()["code"]) == (416, "range_not_satisfiable")


class TestWho:
    def test_another_tenant_sees_what_never_was(self, stranger: Reader, http: httpx2.Client) -> None:
        for path in ("/api/models/acme/{}", "/api/models/acme/{}/tree/main", f"/acme/{{}}/resolve/main/{WEIGHTS}"):
            seen = []
            for name in ("pirate", "ghost"):
                response = http.get(path.format(name), headers={"Authorization": f"Bearer {stranger.token}"})
                body = response.text.replace(response.headers["x-request-id"], "*").replace(name, "*")
                names = sorted(header for header in response.headers if header not in {"date", "x-request-id"})
                seen.append((response.status_code, response.headers["X-Error-Code"], body, names))
            assert seen[0] == seen[1]
            assert seen[0][:2] == (404, "RepoNotFound")
        with pytest.raises(RepositoryNotFoundError):
            stranger.snapshot("acme/pirate")

    def test_a_key_needs_adapters_read(self, make_key: MakeKey, pirate: Versions, make_reader: Callable[[str], Reader]) -> None:
        with pytest.raises(HfHubHTTPError, match=r"403 Forbidden: this key lacks the scope adapters:read"):
            make_reader(make_key("inference", tenant="acme")).api.model_info("acme/pirate")

    def test_no_key_no_answer(self, reader: Reader) -> None:
        for token in (False, "hf_somebodyelses", "lry_nonsense"):
            with pytest.raises(HfHubHTTPError) as caught:
                reader.api.model_info("acme/pirate", token=token)
            assert caught.value.response.status_code == 401
            with pytest.raises(HfHubHTTPError):
                reader.api.snapshot_download("acme/pirate", token=token, cache_dir=reader.cache / "other")

    def test_a_revoked_key_stops(self, reader: Reader, acme: Pusher) -> None:
        key_id = acme.get("/whoami")["key_id"]
        assert reader.api.model_info("acme/pirate").sha
        assert acme.call("DELETE", f"/keys/{key_id}").status_code == 204
        with pytest.raises(HfHubHTTPError, match="unknown, revoked or expired"):
            reader.api.model_info("acme/pirate")
