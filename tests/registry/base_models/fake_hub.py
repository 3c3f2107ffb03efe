"""A hub that speaks as the Hugging Face Hub does: revisions to commits, git ids and LFS digests, redirects to another origin
for large files, ranges, tokens. And one that fails in the ways that hubs fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse

from tests.generate import safetensors_bytes
from tests.registry.adapters.pushing import write_base_model

COMMIT = "d" * 40
TOKEN = "hf_good"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STRAY = {
    "README.md": b"# model", "pytorch_model.bin": b"\x80\x04pickle", "consolidated.safetensors": b"other weights",
    "onnx/model.onnx": b"x", "modeling_evil.py": b"import os", "../../escape.json": b"{}",
}  # fmt: skip


def sharded_model(folder: Path, *, rows: int = 128) -> dict[str, bytes]:
    """The files of a repository with two shards and an index, beside what else lies in repositories."""
    write_base_model(folder)
    rng = np.random.default_rng(0)
    tensors = [
        {"model.embed_tokens.weight": rng.normal(size=(rows, 64)).astype(np.float32)},
        {"model.norm.weight": np.ones(64, np.float32)},
    ]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
    files |= {name: safetensors_bytes(part) for name, part in zip(SHARDS, tensors, strict=True)}
    placed = {tensor: name for name, part in zip(SHARDS, tensors, strict=True) for tensor in part}
    return files | {INDEX: json.dumps({"metadata": {}, "weight_map": placed}).encode(), "tokenizer_config.json": b"{}"} | STRAY


class FakeHub:
    """One private repository, `org/base`. `revisions` name its only commit."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.revisions = files, {"main", "v1.0", COMMIT}
        self.announced: dict[str, str] = {}  # path -> another digest than the bytes have
        self.break_after: int | None = None  # bytes of a large file, once
        self.ignores_ranges = self.is_away = False
        self.holds: threading.Event | None = None  # a large file stops half-way until it is set
        self.half_sent = threading.Event()
        self.ranges: list[str] = []
        self.served: list[str] = []
        self.tokens_at_the_store: list[str | None] = []
        self.url = ""
        self.app = FastAPI()
        self.app.get("/api/models/org/base/revision/{revision:path}")(self._describe)
        self.app.get("/org/base/resolve/{revision}/{path:path}")(self._resolve)
        self.app.get("/store/{path:path}")(self._store)

    def _refusal(self, request: Request, revision: str) -> Response | None:
        if self.is_away:
            return Response(status_code=503)
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({}, status_code=401, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in self.revisions:
            return JSONResponse({}, status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
        return None

    def _describe(self, request: Request, revision: str) -> Response:
        siblings = [self._sibling(path, data) for path, data in self.files.items()]
        return self._refusal(request, revision) or JSONResponse({"id": "org/base", "sha": COMMIT, "siblings": siblings})

    def _sibling(self, path: str, data: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if not path.endswith(".safetensors"):
            return {"rfilename": path, "size": len(data), "blobId": self.announced.get(path, git)}
        sha256 = self.announced.get(path, hashlib.sha256(data).hexdigest())
        return {"rfilename": path, "size": len(data), "blobId": git, "lfs": {"sha256": sha256, "size": len(data), "pointerSize": 134}}

    def _resolve(self, request: Request, revision: str, path: str) -> Response:
        refused = self._refusal(request, revision)
        if refused is not None or path.endswith(".safetensors"):
            return refused or RedirectResponse(f"{self.url.replace('127.0.0.1', 'localhost')}/store/{path}", status_code=302)
        self.served.append(path)
        return Response(self.files[path])

    def _store(self, request: Request, path: str) -> Response:
        """Elsewhere: it must not see the token."""
        self.tokens_at_the_store.append(request.headers.get("authorization"))
        asked = request.headers.get("range")
        data, start = self.files[path], 0
        if asked is not None:
            self.ranges.append(asked)
            start = 0 if self.ignores_ranges else int(asked.removeprefix("bytes=").removesuffix("-"))
        self.served.append(path)
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return StreamingResponse(self._bytes(data[start:]), status_code=206 if start else 200, headers=headers)

    def _bytes(self, data: bytes) -> Iterator[bytes]:
        if self.holds is not None:
            held, self.holds, half = self.holds, None, len(data) // 2
            yield data[:half]
            self.half_sent.set()
            held.wait(60)
            data = data[half:]
        stop, self.break_after = self.break_after, None
        yield data[:stop]
        if stop is not None and stop < len(data):
            raise ConnectionAbortedError("the connection breaks here, as the test asked")
