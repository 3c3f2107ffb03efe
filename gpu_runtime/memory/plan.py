"""Owns how an adapter's matrices are cut into tiles and laid into pages. Pure arithmetic: no bytes move here.

Both matrices are rank-major: A as (rank, in), B transposed to (rank, out), so that one rank row is one contiguous
run, and an adapter of true rank r costs r rows whatever the batch's widest rank is (DESIGN 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpu_runtime.core import TARGETS
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PAGE_ALIGNMENT

PART_A, PART_B = 0, 1


@dataclass(frozen=True)
class Site:
    """One adapted linear: `target` is a name of TARGETS; A is (rank, in_features), B transposed is (rank, out_features)."""

    layer: int
    target: str
    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Tile:
    """Rank rows [first_row, first_row + num_rows) of one matrix, `row_bytes` apart, at `offset` of the plan's page `page`.

    `part` is PART_A or PART_B; `page` counts from 0 within the adapter; `row_bytes` is padded to 16.
    """

    layer: int
    target: str
    part: int
    first_row: int
    num_rows: int
    page: int
    offset: int
    row_bytes: int


class RowPlaces(NamedTuple):
    """Every rank row of a plan as int32 arrays of one length: whose it is, and where, `unit` in PAGE_ALIGNMENT from its page's start."""

    layer: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    part: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    page: npt.NDArray[np.int32]
    unit: npt.NDArray[np.int32]


@dataclass(frozen=True)
class AdapterPlan:
    """Tiles in layer order, so that a prefix of the pages serves a prefix of the layers."""

    sites: tuple[Site, ...]
    tiles: tuple[Tile, ...]
    num_pages: int
    page_bytes: int
    itemsize: int

    @property
    def rank(self) -> int:
        """Of the widest site."""
        return max(site.rank for site in self.sites)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the rows without what is lost at page ends."""
        return sum(tile.num_rows * tile.row_bytes for tile in self.tiles)

    @cached_property
    def row_places(self) -> RowPlaces:
        """Worked out once: a load between two steps must not walk the tiles one by one."""
        columns = [(t.layer, TARGETS.index(t.target), t.part, t.first_row, t.num_rows, t.page, t.offset, t.row_bytes) for t in self.tiles]
        layer, target, part, first, count, page, offset, stride = np.array(columns, np.int32).reshape(-1, 8).T
        within = np.arange(count.sum(), dtype=np.int32) - np.repeat(count.cumsum(dtype=np.int32) - count, count)  # row of its tile
        layer, target, part, first, page, offset, stride = (
            np.repeat(column, count) for column in (layer, target, part, first, page, offset, stride)
        )
        unit = ((offset + within * stride) // PAGE_ALIGNMENT).astype(np.int32)
        return RowPlaces(layer, target, part, first + within, page, unit)


def plan_adapter(layout: PageLayout, sites: Sequence[Site], itemsize: int) -> AdapterPlan:
    """Lay `sites`, stored with `itemsize` bytes an element, into as few pages as packing in layer order takes.

    Raises ValueError for a site that no page can hold, an unknown target, or the same site twice.
    """
    ordered = sorted(sites, key=lambda site: (site.layer, _target_index(site)))
    _check_sites(layout, ordered)
    packer = _Packer(layout.page_bytes)
    for site in ordered:
        packer.add(site, PART_A, row_bytes(site.in_features, itemsize))
        packer.add(site, PART_B, row_bytes(site.out_features, itemsize))
    return AdapterPlan(tuple(ordered), tuple(packer.tiles), packer.num_pages, layout.page_bytes, itemsize)


def row_bytes(num_features: int, itemsize: int) -> int:
    """Bytes of one rank row, padded so that the next one starts on a 16-byte border."""
    return -(-num_features * itemsize // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


def _target_index(site: Site) -> int:
    if site.target not in TARGETS:
        raise ValueError(f"target is {site.target!r}; it must be one of {', '.join(TARGETS)}")
    return TARGETS.index(site.target)


def _check_sites(layout: PageLayout, ordered: Sequence[Site]) -> None:
    places = [(site.layer, site.target) for site in ordered]
    if len(set(places)) != len(places):
        raise ValueError("a site is named twice: give every (layer, target) once")
    for site in ordered:
        if not 0 <= site.layer < layout.num_layers:
            raise ValueError(f"layer is {site.layer}; the model has layers 0 to {layout.num_layers - 1}")
        if min(site.rank, site.in_features, site.out_features) < 1:
            raise ValueError(f"{site} has an empty matrix: leave the site out instead")


class _Packer:
    """Appends rows page by page; a row never crosses a page's end."""

    def __init__(self, page_bytes: int) -> None:
        self.tiles: list[Tile] = []
        self._page_bytes = page_bytes
        self._page = -1
        self._offset = page_bytes  # the first row opens page 0

    @property
    def num_pages(self) -> int:
        return self._page + 1

    def add(self, site: Site, part: int, stride: int) -> None:
        if stride > self._page_bytes:
            raise ValueError(f"a rank row of {site.target} takes {stride} bytes, a page has {self._page_bytes}: raise tokens_per_page")
        first = 0
        while first < site.rank:
            room = (self._page_bytes - self._offset) // stride
            if room == 0:
                self._page, self._offset = self._page + 1, 0
                continue
            count = min(room, site.rank - first)
            self.tiles.append(Tile(site.layer, site.target, part, first, count, self._page, self._offset, stride))
            self._offset += count * stride
            first += count
