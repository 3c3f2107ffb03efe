"""Verified forms and sources in memory for the tests of the adapter tiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_runtime.adapters.form import Form
from gpu_runtime.adapters.source import AdapterUnavailable, Sink
from gpu_runtime.core import AdapterKey
from registry.artifact.digest import sha256_hex
from registry.artifact.manifest import BlobRef, FormManifest
from tests.generate import GeneratedAdapter, generate_adapter, tiny_base

BASE_DIGEST = "b" * 64


def make_form(adapter: GeneratedAdapter | None = None, *, tenant: str = "t", seed: int = 0, base_digest: str = BASE_DIGEST) -> Form:
    files = (adapter or generate_adapter(tiny_base(), seed=seed)).files
    manifest = FormManifest(base_digest, {name: BlobRef(sha256_hex(data), len(data)) for name, data in files.items()})
    return Form(AdapterKey(tenant, manifest.digest), "e" * 64, manifest, files)


class MemorySource:
    """Serves forms; `corrupt` changes a blob's bytes on the way out. Counts its calls."""

    def __init__(self, *forms: Form) -> None:
        self.forms = {form.key: form for form in forms}
        self.num_described = 0
        self.num_fetched = 0
        self.failure: AdapterUnavailable | None = None
        self.corrupt = lambda data: data
        self.grants: list[str | None] = []

    def describe(self, key: AdapterKey, *, grant: str | None) -> tuple[Mapping[str, Any], str]:
        self.num_described += 1
        self.grants.append(grant)
        if self.failure is not None:
            raise self.failure
        return self.forms[key].manifest.to_json(), "e" * 64

    def fetch(self, key: AdapterKey, sha256: str, into: Sink, *, grant: str | None) -> None:
        self.num_fetched += 1
        form = self.forms[key]
        data = self.corrupt(next(form.blobs[name] for name, blob in form.manifest.blobs.items() if blob.sha256 == sha256))
        for start in range(0, len(data), 1000):
            into.write(data[start : start + 1000])
