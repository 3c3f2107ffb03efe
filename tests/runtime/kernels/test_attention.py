"""Rotary embedding, the write of K and V, and paged attention against an fp64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from gpu_runtime.kernels.backend import HeadNorms, Kernels, RopeTables, select_backend
from gpu_runtime.kernels.batch import BatchRow, ForwardBatch, build_batch
from gpu_runtime.memory.layout import PageLayout, kv_view
from gpu_runtime.memory.pages import PagePool

LAYER = 1
SHAPES = [(4, 4, 16), (9, 3, 64), (8, 1, 32), (10, 2, 24), (1, 1, 8), (6, 3, 128)]


class Cache:
    """A poisoned pool with requests of random K and V, kept beside it as (tokens, kv_heads, head_dim)."""

    def __init__(self, *, num_heads: int, kv_heads: int, head_dim: int) -> None:
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.layout = PageLayout(2, kv_heads, head_dim)
        self.pool = PagePool(num_pages=96, page_bytes=self.layout.page_bytes, poison_freed=True)
        self.kv = kv_view(self.pool, self.layout)
        self.known: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.tables: list[list[int]] = []

    def add(self, length: int, *, seed: int, fill: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(length, self.kv_heads, self.head_dim, generator=generator) for _ in range(2))
        if fill is not None:
            k, v = torch.full_like(k, fill), torch.full_like(v, fill)
        pages = sorted(self.pool.allocate(self.layout.pages_for(length), owner="r"), key=lambda page: (page * 37) % 96)
        for token in range(length):
            page, offset = pages[token // 16], token % 16
            self.kv[page, LAYER, 0, :, offset], self.kv[page, LAYER, 1, :, offset] = k[token], v[token]
        self.known.append((k, v))
        self.tables.append(pages)

    def batch(self, queries: list[tuple[int, int]]) -> ForwardBatch:
        """Rows (request, number of its last tokens that are queries)."""
        rows = [BatchRow([0] * count, len(self.known[at][0]) - count, self.tables[at]) for at, count in queries]
        return build_batch(rows, tokens_per_page=16)

    def random_qkv(self, num_tokens: int, *, seed: int = 0) -> torch.Tensor:
        width = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))

    def oracle(self, qkv: torch.Tensor, queries: list[tuple[int, int]], *, window: int = 0) -> torch.Tensor:
        rows, token = [], 0
        group = self.num_heads // self.kv_heads
        for at, count in queries:
            k, v = (part.double().repeat_interleave(group, 1) for part in self.known[at])
            for back in range(count, 0, -1):
                end = len(k) - back + 1
                q = qkv[token, : self.num_heads * self.head_dim].double().view(self.num_heads, self.head_dim)
                first = max(0, end - window) if window else 0
                weights = (torch.einsum("hd,chd->hc", q, k[first:end]) / math.sqrt(self.head_dim)).softmax(-1)
                rows.append(torch.einsum("hc,chd->hd", weights, v[first:end]).flatten())
                token += 1
        return torch.stack(rows)


def attend(kernels: Kernels, cache: Cache, qkv: torch.Tensor, queries: list[tuple[int, int]], *, window: int = 0) -> torch.Tensor:
    batch, scale = cache.batch(queries), cache.head_dim**-0.5
    return kernels.paged_attention(qkv, num_heads=cache.num_heads, kv=cache.kv, layer=LAYER, batch=batch, scale=scale, window=window)


@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), SHAPES)
def test_attention_equals_the_fp64_oracle(kernels: Kernels, num_heads: int, kv_heads: int, head_dim: int) -> None:
    """f32 scores of size sqrt(head_dim) and a softmax over up to 333 terms: 1e-5 is some 100 roundings of the largest."""
    cache = Cache(num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim)
    lengths = [1, 2, 15, 16, 17, 47, 64, 333]
    for seed, length in enumerate(lengths):
        cache.add(length, seed=seed)
    queries = [(0, 1), (1, 2), (2, 15), (3, 1), (4, 5), (5, 1), (6, 33), (7, 1)]
    qkv = cache.random_qkv(sum(count for _, count in queries))
    difference = attend(kernels, cache, qkv, queries).double() - cache.oracle(qkv, queries)
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("window", [1, 20, 64, 300])
def test_a_window_ends_what_a_query_sees(kernels: Kernels, window: int) -> None:
    """Windows shorter than a page, across pages and across a split of the decode kernel; prompts in one piece and cut."""
    cache = Cache(num_heads=4, kv_heads=2, head_dim=32)
    for seed, length in enumerate([1, 17, 80, 333, 530]):
        cache.add(length, seed=seed)
    queries = [(0, 1), (1, 17), (2, 1), (3, 40), (4, 1)]
    qkv = cache.random_qkv(sum(count for _, count in queries))
    whole = attend(kernels, cache, qkv, queries, window=window)
    assert float((whole.double() - cache.oracle(qkv, queries, window=window)).abs().max()) < 1e-5
    assert attend(kernels, cache, qkv[29:59], [(3, 30)], window=window).equal(whole[29:59])


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    cache = Cache(num_heads=2, kv_heads=1, head_dim=32)
    cache.add(40, seed=0)
    qkv = cache.random_qkv(1) * 1e4
    out = attend(kernels, cache, qkv, [(0, 1)])
    assert float((out.double() - cache.oracle(qkv, [(0, 1)])).abs().max()) < 1e-3  # the scores themselves carry 1e-7 * 1e4


@pytest.mark.parametrize("fill", [float("nan"), 1e30, float("inf")])
def test_a_neighbours_kv_changes_no_bit_of_mine(kernels: Kernels, fill: float) -> None:
    cache = Cache(num_heads=9, kv_heads=3, head_dim=64)
    for seed, length in enumerate([20, 33, 50]):
        cache.add(length, seed=seed)
    cache.add(40, seed=9, fill=fill)
    qkv = cache.random_qkv(6)
    alone = attend(kernels, cache, qkv[[0, 2, 4]], [(0, 1), (1, 1), (2, 1)])
    beside = attend(kernels, cache, qkv, [(0, 1), (3, 1), (1, 1), (3, 1), (2, 1), (3, 1)])
    assert beside[[0, 2, 4]].equal(alone)


def test_a_row_depends_neither_on_its_batch_nor_on_how_the_prompt_was_cut() -> None:
    cache = Cache(num_heads=9, kv_heads=3, head_dim=64)
    for seed, length in enumerate([70, 3, 35]):
        cache.add(length, seed=seed)
    qkv = cache.random_qkv(70 + 3 + 35)
    whole = attend(select_backend(threads=2), cache, qkv, [(0, 70), (1, 3), (2, 35)])
    one_thread = select_backend(threads=1)
    last = attend(one_thread, cache, qkv[60:70], [(0, 10)])
    assert last.equal(whole[60:70])
    assert attend(one_thread, cache, qkv[72:73], [(1, 1)]).equal(whole[72:73])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), SHAPES)
def test_rope_and_write(kernels: Kernels, num_heads: int, kv_heads: int, head_dim: int, normed: bool) -> None:
    cache = Cache(num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim)
    pages = [cache.pool.allocate(3, owner="a"), cache.pool.allocate(1, owner="b")[::-1]]
    batch = build_batch([BatchRow([0] * 21, 14, pages[0]), BatchRow([0], 0, pages[1])], tokens_per_page=16)
    angles = torch.outer(torch.arange(64.0), 1 / 100 ** (torch.arange(head_dim // 2) / (head_dim // 2)))
    qkv = cache.random_qkv(22)
    rotated = qkv.clone()
    before = cache.pool.data.clone()
    rope, norms = RopeTables(angles.cos(), angles.sin()), HeadNorms(torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 1e-6)
    kernels.rope_kv_write(rotated, num_heads=num_heads, rope=rope, kv=cache.kv, layer=LAYER, batch=batch, norms=norms if normed else None)
    heads = qkv.double().view(22, -1, head_dim)
    if normed:
        weights = torch.cat((norms.q.expand(num_heads, -1), norms.k.expand(kv_heads, -1), torch.ones(kv_heads, head_dim)))
        heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights
    turned = (
        torch.view_as_complex(torch.stack(heads.chunk(2, -1), -1))
        * torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[batch.positions][:, None]
    )
    expected = torch.cat((turned.real, turned.imag), -1)
    assert float((rotated.view(22, -1, head_dim)[:, :num_heads] - expected[:, :num_heads]).abs().max()) < 1e-5
    for token, kv_slot in enumerate(batch.kv_slots.tolist()):
        k, v = cache.kv[kv_slot // 16, LAYER, :, :, kv_slot % 16]
        assert float((k - expected[token, num_heads : num_heads + kv_heads]).abs().max()) < 1e-5
        assert v.equal(qkv.view(22, -1, head_dim)[token, num_heads + kv_heads :])
    written = int((cache.pool.data != before).view(-1, 4).any(-1).sum())
    assert written <= 22 * 2 * kv_heads * head_dim, "nothing else in the pool may change"
