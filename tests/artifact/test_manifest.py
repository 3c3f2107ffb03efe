"""Version and form manifests: golden digests, closed reading, safe paths."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.artifact.errors import ArtifactRefused
from registry.artifact.manifest import BlobRef, FileEntry, FormManifest, VersionManifest, require_safe_path

A, B, C = "a" * 64, "b" * 64, "c" * 64
CONFIG, WEIGHTS = FileEntry("adapter_config.json", A, 10), FileEntry("adapter_model.safetensors", B, 2000)
VERSION = VersionManifest(files=(WEIGHTS, CONFIG))
FORM = FormManifest.raw(VERSION, base_digest=C)

VERSION_DIGEST = "f28f6d8982be5f080f88b4ae5ac54877262b4782bae578caeb6d2aaea31e7f2b"
FORM_DIGEST = "d2f53ab887f0be031ed272a31faaf64c5183ea081800558a2ce8cf493b8ea308"


def test_golden_digests() -> None:
    assert VERSION.digest == VERSION_DIGEST
    assert FORM.digest == FORM_DIGEST


def test_order_of_files_does_not_matter_and_content_does() -> None:
    assert VersionManifest(files=(CONFIG, WEIGHTS)) == VERSION
    others = [FileEntry(CONFIG.path, A, 11), FileEntry(CONFIG.path, B, 10), FileEntry("README.md", A, 10)]
    digests = {VersionManifest(files=(other, WEIGHTS)).digest for other in others} | {VERSION.digest}
    assert len(digests) == 4


def test_form_depends_on_base_and_adapter_bytes_alone() -> None:
    with_readme = VersionManifest(files=(*VERSION.files, FileEntry("README.md", C, 5)))
    assert with_readme.digest != VERSION.digest
    assert FormManifest.raw(with_readme, base_digest=C).digest == FORM.digest
    assert FormManifest.raw(VERSION, base_digest=A).digest != FORM.digest


def test_there_and_back() -> None:
    for manifest in (VERSION, FORM):
        again = type(manifest).from_json(json.loads(json.dumps(manifest.to_json())))
        assert again == manifest
        assert again.digest == manifest.digest
    assert VERSION.size_bytes == FORM.size_bytes == 2010
    assert VERSION.file("adapter_config.json") == CONFIG
    assert VERSION.file("README.md") is None


def changed(manifest: VersionManifest | FormManifest, **changes: Any) -> dict[str, Any]:
    fields = manifest.to_json() | changes
    return {key: value for key, value in fields.items() if value is not ...}


BAD_VERSIONS = [
    None,
    [],
    changed(VERSION, more=1),
    changed(VERSION, schema=2),
    changed(VERSION, schema=True),
    changed(VERSION, schema=...),
    changed(VERSION, files={}),
    changed(VERSION, files=[]),
    changed(VERSION, files=[CONFIG.to_json()] * 2),
    changed(VERSION, files=[CONFIG.to_json() | {"mode": 1}]),
    changed(VERSION, files=[CONFIG.to_json() | {"path": 1}]),
    changed(VERSION, files=[CONFIG.to_json() | {"path": "../x"}]),
    changed(VERSION, files=[CONFIG.to_json() | {"sha256": "A" * 64}]),
    changed(VERSION, files=[CONFIG.to_json() | {"size": -1}]),
    changed(VERSION, files=[CONFIG.to_json() | {"size": 1.0}]),
    changed(VERSION, files=[CONFIG.to_json() | {"size": True}]),
    changed(VERSION, files=[CONFIG.to_json() | {"size": 2**60}]),
    changed(VERSION, files=[CONFIG.to_json() | {"path": f"f{n}"} for n in range(65)]),
]
BAD_FORMS = [
    "raw",
    changed(FORM, kind="svd"),
    changed(FORM, kind=["raw"]),
    changed(FORM, schema=0),
    changed(FORM, base_digest="sha256:" + C),
    changed(FORM, base_digest=None),
    changed(FORM, blobs=[]),
    changed(FORM, blobs={}),
    changed(FORM, blobs={"adapter_config.json": CONFIG.to_json()}),
    changed(FORM, blobs=FORM.to_json()["blobs"] | {"README.md": {"sha256": A, "size": 1}}),
    changed(FORM, blobs=FORM.to_json()["blobs"] | {"adapter_config.json": {"sha256": A}}),
    changed(FORM, revision=3),
]


@pytest.mark.parametrize("value", BAD_VERSIONS)
def test_bad_version_manifests(value: object) -> None:
    with pytest.raises(ArtifactRefused):
        VersionManifest.from_json(value)


@pytest.mark.parametrize("value", BAD_FORMS)
def test_bad_form_manifests(value: object) -> None:
    with pytest.raises(ArtifactRefused) as refused:
        FormManifest.from_json(value)
    assert refused.value.code == "bad_manifest"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["schema", "files", "kind", "blobs", "x"]), inner),
    max_leaves=8,
)


@given(json_values)
def test_no_other_error_ever_leaves(value: object) -> None:
    for kind in (VersionManifest, FormManifest):
        with pytest.raises(ArtifactRefused):
            kind.from_json(value)


def test_a_version_without_weights_has_no_raw_form() -> None:
    with pytest.raises(ArtifactRefused):
        FormManifest.raw(VersionManifest(files=(CONFIG,)), base_digest=C)
    with pytest.raises(ArtifactRefused):
        BlobRef("x", 1)


@given(st.text(max_size=30))
def test_safe_paths_stay_inside(path: str) -> None:
    try:
        require_safe_path(path)
    except ArtifactRefused:
        return
    parts = path.split("/")
    assert all(part and not part.startswith(".") for part in parts)
    assert path.isascii()
    assert "\\" not in path
    assert "\0" not in path
