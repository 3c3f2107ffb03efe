"""Layouts, adapter plans and slot tables: tiles that fit, cover every row once and end up where the tables say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_runtime.core import TARGETS
from gpu_runtime.memory.layout import PageLayout, kv_view
from gpu_runtime.memory.pages import PagePool
from gpu_runtime.memory.plan import PART_A, PART_B, Site, plan_adapter
from gpu_runtime.memory.tables import SlotTables

LAYOUT = PageLayout(num_layers=4, num_kv_heads=1, head_dim=8, tokens_per_page=16)  # pages of 4096 bytes
SITES = st.builds(
    Site,
    layer=st.integers(0, 3),
    target=st.sampled_from(TARGETS),
    rank=st.integers(1, 64),
    in_features=st.integers(1, 500),
    out_features=st.integers(1, 500),
)


@settings(max_examples=80, deadline=None)
@given(
    sites=st.lists(SITES, max_size=12, unique_by=lambda site: (site.layer, site.target)), itemsize=st.sampled_from([2, 4]), data=st.data()
)
def test_tiles_cover_every_row_once_and_never_cross_a_page(sites: list[Site], itemsize: int, data: st.DataObject) -> None:
    plan = plan_adapter(LAYOUT, sites, itemsize)
    taken: list[tuple[int, int, int]] = []
    rows: dict[tuple[int, str, int], list[int]] = {}
    for tile in plan.tiles:
        end = tile.offset + tile.num_rows * tile.row_bytes
        assert tile.offset % 16 == 0
        assert tile.row_bytes % 16 == 0
        assert end <= LAYOUT.page_bytes
        taken.append((tile.page, tile.offset, end))
        rows.setdefault((tile.layer, tile.target, tile.part), []).extend(range(tile.first_row, tile.first_row + tile.num_rows))
    assert taken == sorted(taken)
    assert all(page != following or end <= start for (page, _, end), (following, start, _) in pairwise(taken))
    assert rows == {(site.layer, site.target, part): list(range(site.rank)) for site in sites for part in (PART_A, PART_B)}
    assert [tile.layer for tile in plan.tiles] == sorted(tile.layer for tile in plan.tiles)
    assert plan.num_pages == len({tile.page for tile in plan.tiles})
    _check_tables(plan, data)


def _check_tables(plan, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    tables = SlotTables(num_slots=3, num_layers=4, max_rank=64)
    pages = data.draw(st.permutations(range(plan.num_pages)))
    scales = [0.25 * at for at in range(len(plan.sites))]
    tables.install(1, plan, pages, scales, torch.float16)
    tables.check_integrity()
    for tile in plan.tiles:
        for row in range(tile.num_rows):
            unit = int(tables.rows[1, tile.layer, TARGETS.index(tile.target), tile.part, tile.first_row + row])
            assert unit * 16 == pages[tile.page] * plan.page_bytes + tile.offset + row * tile.row_bytes
    for site, scale in zip(plan.sites, scales, strict=True):
        assert int(tables.ranks[1, site.layer, TARGETS.index(site.target)]) == site.rank
        assert float(tables.scales[1, site.layer, TARGETS.index(site.target)]) == scale
    assert int(tables.ranks[[0, 2]].sum()) == 0
    tables.clear(1)
    assert int(tables.ranks.sum()) == 0
    assert bool((tables.rows == -1).all())


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (Site(4, "q_proj", 1, 8, 8), "layer is 4; the model has layers 0 to 3"),
        (Site(0, "lm_head", 1, 8, 8), "target is 'lm_head'"),
        (Site(0, "q_proj", 0, 8, 8), "empty matrix"),
        (Site(0, "q_proj", 1, 2000, 8), "raise tokens_per_page"),
    ],
)
def test_a_site_that_cannot_be_placed_is_refused(site: Site, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_adapter(LAYOUT, [site], 4)
    with pytest.raises(ValueError, match="named twice"):
        plan_adapter(LAYOUT, [Site(0, "q_proj", 1, 8, 8)] * 2, 4)


def test_a_slot_refuses_what_kernels_cannot_read_and_keeps_what_it_had() -> None:
    tables = SlotTables(num_slots=1, num_layers=4, max_rank=8)
    plan = plan_adapter(LAYOUT, [Site(0, "q_proj", 8, 8, 8)], 2)
    tables.install(0, plan, [0], [1.0], torch.bfloat16)
    wide = plan_adapter(LAYOUT, [Site(0, "q_proj", 9, 8, 8)], 2)
    with pytest.raises(ValueError, match="rank is 9; this runtime was started with max_rank 8"):
        tables.install(0, wide, [0], [1.0], torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        tables.install(0, plan, [0], [1.0], torch.int8)
    assert int(tables.ranks[0, 0, 0]) == 8


def test_a_layout_holds_the_widest_row_or_takes_more_tokens_a_page() -> None:
    with pytest.raises(ValueError, match="raise tokens_per_page"):
        PageLayout(1, 1, 8, tokens_per_page=16, widest_row_bytes=5000)
    layout = PageLayout.fitting(num_layers=1, num_kv_heads=1, head_dim=8, kv_dtype=torch.float32, widest_row_bytes=5000)
    assert (layout.tokens_per_page, layout.page_bytes) == (128, 8192)
    assert [layout.pages_for(tokens) for tokens in (0, 1, 128, 129)] == [0, 1, 1, 2]


def test_the_kv_view_is_the_pool_itself() -> None:
    pool = PagePool(num_pages=3, page_bytes=LAYOUT.page_bytes)
    view = kv_view(pool, LAYOUT)
    assert view.shape == (3, 4, 2, 1, 16, 8)
    view[2, 3, 1, 0, 15, 7] = 1.0
    assert bool(pool.data[2, -4:].any())
    assert not bool(pool.data[:2].any())
