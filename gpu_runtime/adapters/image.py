"""Page images: an adapter's matrices in the exact bytes that the pool shall hold, so that a load is one copy a page.

A stays (rank, in), B (out, rank) becomes (rank, out); both keep their stored dtype. numpy alone: pull threads must not
open OpenMP pools of their own.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_runtime.adapters.form import Form
from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import POISON
from gpu_runtime.memory.plan import PART_A, PART_B, AdapterPlan, Site, Tile, plan_adapter
from registry.artifact.base import BaseSpec
from registry.artifact.errors import ArtifactRefused
from registry.artifact.header import TensorEntry, parse_header
from registry.artifact.lora import LoraLayout, LoraPair, parse_config
from registry.artifact.manifest import CONFIG_FILE, WEIGHTS_FILE

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RAW = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}  # the same bits, moved but never computed with

Raw = npt.NDArray[np.unsignedinteger[npt.NBitBase]]


@dataclass(frozen=True)
class AdapterImage:
    """`data` (num_pages, page_bytes) uint8 on the host; `scales` one factor a site of `plan`; `dtype` of the stored rows."""

    plan: AdapterPlan
    data: torch.Tensor
    scales: tuple[float, ...]
    dtype: torch.dtype

    @property
    def num_pages(self) -> int:
        return self.plan.num_pages

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    @property
    def rank(self) -> int:
        """Of its widest site."""
        return self.plan.rank


class ImageBuilder:
    """Turns verified forms into images for one base model and page layout. Any thread.

    `base_digest` None: the caller answers for every form belonging to this base model (benches, tiny models).
    `poison_gaps` fills what no row uses with 0xFF, so that a kernel which reads beyond its rows is caught.
    """

    def __init__(
        self, *, layout: PageLayout, base: BaseSpec, max_rank: int, base_digest: str | None = None, poison_gaps: bool = False
    ) -> None:
        self._layout = layout
        self._base = base
        self._max_rank = max_rank
        self._base_digest = base_digest
        self._gap = POISON if poison_gaps else 0

    def build(self, form: Form) -> AdapterImage:
        """Raises AdapterUnavailable, never to be retried, for a form that this runtime cannot serve."""
        manifest = form.manifest
        if self._base_digest is not None and manifest.base_digest != self._base_digest:
            raise AdapterUnavailable(
                f"the adapter was made for base model {manifest.base_digest}, this runtime serves {self._base_digest}", retryable=False
            )
        try:
            return self._build(form)
        except (ArtifactRefused, ValueError, KeyError) as error:
            raise AdapterUnavailable(f"form {form.key.form_digest} cannot be loaded: {error}", retryable=False) from error

    def _build(self, form: Form) -> AdapterImage:
        weights = form.blobs[WEIGHTS_FILE]
        header = parse_header(io.BytesIO(weights), file_size=len(weights))
        config = parse_config(form.blobs[CONFIG_FILE])
        layout = LoraLayout.resolve(config, header=header, base=self._base, max_rank=self._max_rank)
        pairs = {(pair.layer, pair.target): pair for pair in layout.pairs}
        plan = plan_adapter(self._layout, [_site(pair) for pair in layout.pairs], _DTYPES[layout.dtype].itemsize)
        data = np.full((plan.num_pages, plan.page_bytes), self._gap, dtype=np.uint8)
        matrices: dict[tuple[int, str, int], Raw] = {}
        for place, pair in pairs.items():
            matrices[(*place, PART_A)] = _rows(weights, header.data_start, pair.a)
            matrices[(*place, PART_B)] = _rows(weights, header.data_start, pair.b).T
        for tile in plan.tiles:
            _place(data, tile, matrices[tile.layer, tile.target, tile.part])
        scales = tuple(pairs[site.layer, site.target].scale for site in plan.sites)
        return AdapterImage(plan, torch.from_numpy(data), scales, _DTYPES[layout.dtype])


def _site(pair: LoraPair) -> Site:
    return Site(pair.layer, pair.target, pair.rank, in_features=pair.a.shape[1], out_features=pair.b.shape[0])


def _rows(weights: bytes, data_start: int, entry: TensorEntry) -> Raw:
    """The tensor's raw bits in its own shape."""
    flat: Raw = np.frombuffer(weights[data_start + entry.start : data_start + entry.end], dtype=_RAW[entry.dtype])
    return flat.reshape(entry.shape)


def _place(data: npt.NDArray[np.uint8], tile: Tile, matrix: Raw) -> None:
    """Write the tile's rank rows of `matrix` (rank, features) where the plan puts them."""
    chunk = np.ascontiguousarray(matrix[tile.first_row : tile.first_row + tile.num_rows]).view(np.uint8)
    room = data[tile.page, tile.offset : tile.offset + tile.num_rows * tile.row_bytes].reshape(tile.num_rows, tile.row_bytes)
    room[:, : chunk.shape[1]] = chunk
