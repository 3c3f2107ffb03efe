"""Pushing as a client does it, for every test that needs an adapter in a registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from tests.generate import TINY_CONFIG, GeneratedAdapter, generate_adapter, safetensors_bytes, tiny_base

BASE = tiny_base()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def adapter(seed: int = 0, **options: Any) -> GeneratedAdapter:
    return generate_adapter(BASE, seed=seed, **options)


def nan_adapter(seed: int = 0) -> GeneratedAdapter:
    """Config and header are right; one weight is NaN."""
    good = adapter(seed)
    name = good.name(0, "q_proj", "B")
    values = good.tensors[name].copy()
    values[3, 1] = np.nan
    return good.with_tensors(**{name: values})


def write_base_model(folder: Path, *, seed: int = 0) -> Path:
    """A folder that passes as a model: the config of `tiny_base`, a tokenizer, two tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": rng.normal(size=(128, 64)), "model.norm.weight": np.ones(64)}
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    (folder / "model.safetensors").write_bytes(safetensors_bytes({name: value.astype(np.float32) for name, value in tensors.items()}))
    return folder


@dataclass(frozen=True)
class Pusher:
    """One tenant's client."""

    client: TestClient
    headers: dict[str, str]

    def call(self, method: str, path: str, **options: Any) -> Any:
        headers = self.headers | options.pop("headers", {})
        return self.client.request(method, f"/api/v1{path}", headers=headers, **options)

    def get(self, path: str, **options: Any) -> Any:
        """The body of a GET that must succeed."""
        response = self.call("GET", path, **options)
        assert response.status_code == 200, response.text
        return response.json()

    def upload(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """{path: sha256} of the uploaded files."""
        for data in files.values():
            response = self.call("PUT", f"/blobs/{sha256(data)}", content=data)
            assert response.status_code in {200, 201}, response.text
        return {path: sha256(data) for path, data in files.items()}

    def push(self, name: str, files: GeneratedAdapter | Mapping[str, bytes], **body: Any) -> Any:
        """The response of uploading the files and naming them as a version."""
        contents = files.files if isinstance(files, GeneratedAdapter) else files
        return self.call("POST", f"/adapters/{name}/versions", json={"files": self.upload(contents), **body})

    def put_alias(self, name: str, alias: str, version: int, **headers: str) -> Any:
        return self.call("PUT", f"/adapters/{name}/aliases/{alias}", json={"version": version}, headers=headers)
