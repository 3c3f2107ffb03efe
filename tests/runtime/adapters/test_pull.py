"""A pull believes nothing: manifest, sizes, digests, base model; the disk tier saves the second one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_runtime.adapters.disk import DiskCache
from gpu_runtime.adapters.image import AdapterImage, ImageBuilder
from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.adapters.pull import Puller
from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import AdapterKey
from gpu_runtime.memory.layout import PageLayout
from tests.generate import GeneratedAdapter, generate_adapter, tiny_base
from tests.runtime.adapters.forms import BASE_DIGEST, MemorySource, make_form

LAYOUT = PageLayout.fitting(num_layers=2, num_kv_heads=2, head_dim=16, kv_dtype=torch.float32, widest_row_bytes=96 * 4)
BUILDER = ImageBuilder(layout=LAYOUT, base=tiny_base(), max_rank=16, base_digest=BASE_DIGEST, poison_gaps=True)


def make_puller(source: object, *, disk: DiskCache | None = None, max_form_bytes: int = 10**9) -> Puller:
    return Puller(source, builder=BUILDER, disk=disk, max_form_bytes=max_form_bytes)  # type: ignore[arg-type]


def rows_of(image: AdapterImage, layer: int, target: str, part: int) -> np.ndarray:
    """The matrix (rank, features) as float32, read back from the tiles."""
    features = {0: 64, 1: {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}.get(target, 64)}[part]
    if target == "down_proj" and part == 0:
        features = 96
    parts = []
    for tile in image.plan.tiles:
        if (tile.layer, tile.target, tile.part) == (layer, target, part):
            raw = image.data[tile.page, tile.offset : tile.offset + tile.num_rows * tile.row_bytes]
            parts.append(raw.clone().view(image.dtype).view(tile.num_rows, -1)[:, :features].float().numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_images_hold_the_stored_values(dtype: str) -> None:
    targets = ("q_proj", "k_proj", "gate_proj", "down_proj")
    adapter = generate_adapter(tiny_base(), rank=11, targets=targets, dtype=dtype, alpha_pattern={"k_proj": 3})
    form = make_form(adapter)
    image = make_puller(MemorySource(form)).pull(form.key, grant="g")
    for site, scale in zip(image.plan.sites, image.scales, strict=True):
        a, b = rows_of(image, site.layer, site.target, 0), rows_of(image, site.layer, site.target, 1)
        assert scale == pytest.approx(adapter.scale(site.layer, site.target))
        np.testing.assert_array_equal(a, adapter.tensors[adapter.name(site.layer, site.target, "A")])
        np.testing.assert_array_equal(b, adapter.tensors[adapter.name(site.layer, site.target, "B")].T)
    assert len(image.plan.sites) == 2 * len(targets)


def test_the_disk_saves_the_second_pull(tmp_path: Path) -> None:
    form = make_form()
    source = MemorySource(form)
    first = make_puller(source, disk=DiskCache(tmp_path, max_bytes=10**8)).pull(form.key, grant="one")
    again = make_puller(source, disk=DiskCache(tmp_path, max_bytes=10**8)).pull(form.key, grant="two")
    assert source.grants == ["one"]
    assert torch.equal(first.data, again.data)


def test_a_corrupt_file_is_pulled_again(tmp_path: Path) -> None:
    form = make_form()
    source = MemorySource(form)
    puller = make_puller(source, disk=DiskCache(tmp_path, max_bytes=10**8))
    puller.pull(form.key, grant=None)
    blob = next(tmp_path.glob(f"*/{form.manifest.blobs['adapter_model.safetensors'].sha256}"))
    blob.write_bytes(bytes(len(blob.read_bytes())))
    puller.pull(form.key, grant=None)
    assert source.num_described == 2
    puller.check_integrity()


def test_a_disk_without_room_does_not_matter(tmp_path: Path) -> None:
    form = make_form()
    puller = make_puller(MemorySource(form), disk=DiskCache(tmp_path, max_bytes=1))
    assert puller.pull(form.key, grant=None).num_pages > 0
    assert puller.disk_keys() == ()


def refusal(source: MemorySource, key: AdapterKey, **settings: int) -> AdapterUnavailable:
    with pytest.raises(AdapterUnavailable) as caught:
        make_puller(source, **settings).pull(key, grant=None)
    return caught.value


def test_another_manifest_than_asked_for() -> None:
    form, other = make_form(seed=1), make_form(seed=2)
    source = MemorySource(form)
    source.forms[other.key] = form
    assert form.key.form_digest in refusal(source, other.key).reason
    assert source.num_fetched == 0


@pytest.mark.parametrize(
    ("corrupt", "says"),
    [
        (lambda data: data[:-1], "declares"),
        (lambda data: data + b"x", "more than"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "has sha256"),
        (lambda data: b"", "declares"),
    ],
)
def test_other_bytes_than_the_manifest_says(corrupt: object, says: str) -> None:
    form = make_form()
    source = MemorySource(form)
    source.corrupt = corrupt  # type: ignore[assignment]
    error = refusal(source, form.key)
    assert says in error.reason
    assert error.retryable


def test_too_large_is_refused_before_any_byte_moves() -> None:
    form = make_form()
    source = MemorySource(form)
    assert "can hold 10" in refusal(source, form.key, max_form_bytes=10).reason
    assert source.num_fetched == 0


def test_another_base_model() -> None:
    form = make_form(base_digest="c" * 64)
    error = refusal(MemorySource(form), form.key)
    assert "base model" in error.reason
    assert not error.retryable


@pytest.mark.parametrize(
    "adapter",
    [
        generate_adapter(tiny_base(), rank=17),
        generate_adapter(tiny_base(num_hidden_layers=3)),
        generate_adapter(tiny_base()).with_config(use_dora=True),
        generate_adapter(tiny_base(hidden_size=32, head_dim=8)),
    ],
)
def test_what_the_gate_should_have_refused(adapter: GeneratedAdapter) -> None:
    form = make_form(adapter)
    error = refusal(MemorySource(form), form.key)
    assert "cannot be loaded" in error.reason
    assert not error.retryable


def test_local_folders_are_a_source(tmp_path: Path) -> None:
    folder = generate_adapter(tiny_base()).write(tmp_path / "a")
    source = LocalSource(base_digest=BASE_DIGEST)
    key = source.add(folder, tenant="t")
    assert key == make_form().key
    assert make_puller(source).pull(key, grant=None).num_pages > 0
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterUnavailable, match="cannot be read"):
        make_puller(source).pull(key, grant=None)
    with pytest.raises(AdapterUnavailable, match="unknown"):
        make_puller(source).pull(AdapterKey("u", key.form_digest), grant=None)
