"""A model that trusts nothing: it keeps token ids in the KV pages and computes from what it finds there again.

The next token is a hash of the whole context as the pages hold it and of the adapter's weights as the slot tables reach
them. So any page lent twice, any lost chunk and any slot pointing astray changes the tokens, and `expected_tokens`, which
knows nothing of pages, tells.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from gpu_runtime.adapters.image import AdapterImage
from gpu_runtime.adapters.source import AdapterUnavailable
from gpu_runtime.core import NO_SLOT, AdapterKey
from gpu_runtime.kernels.backend import BaseMatrix, LoraSites, PackedWeight
from gpu_runtime.kernels.batch import ForwardBatch
from gpu_runtime.memory.layout import PageLayout
from gpu_runtime.memory.pages import PAGE_ALIGNMENT, PagePool
from gpu_runtime.memory.plan import Site, plan_adapter
from gpu_runtime.memory.tables import SlotTables

VOCAB = 50
WIDTH = 8  # features of the one linear that its adapters touch
LAYOUT = PageLayout(num_layers=1, num_kv_heads=1, head_dim=4, tokens_per_page=4)  # 128 bytes a page


def next_token(context: Sequence[int], weight: int) -> int:
    return zlib.crc32(repr((list(context), weight)).encode()) % VOCAB


def expected_tokens(prompt: Sequence[int], weight: int, count: int) -> list[int]:
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, weight))
    return context[len(prompt) :]


def make_image(weight: int, rank: int) -> AdapterImage:
    """Every element of A and B is `weight`; gaps are poisoned."""
    plan = plan_adapter(LAYOUT, [Site(0, "q_proj", rank, WIDTH, WIDTH)], 4)
    data = np.full((plan.num_pages, plan.page_bytes), 0xFF, dtype=np.uint8)
    for tile in plan.tiles:
        rows = np.full(tile.num_rows * tile.row_bytes // 4, weight, dtype=np.float32).view(np.uint8)
        data[tile.page, tile.offset : tile.offset + rows.size] = rows
    return AdapterImage(plan, torch.from_numpy(data), (1.0,), torch.float32)


class LedgerPuller:
    """Makes images of known weights; pulls of keys in `failing` fail."""

    def __init__(self) -> None:
        self.failing: set[AdapterKey] = set()
        self.num_pulls = 0

    def pull(self, key: AdapterKey, *, grant: str | None) -> AdapterImage:
        self.num_pulls += 1
        if key in self.failing:
            raise AdapterUnavailable("told to fail", retryable=True)
        return make_image(*weight_and_rank(key))

    def forget(self, key: AdapterKey) -> None:
        pass

    def disk_keys(self) -> tuple[AdapterKey, ...]:
        return ()


def weight_and_rank(key: AdapterKey) -> tuple[int, int]:
    """Keys of these tests say their weight and rank in the digest: "7/3"."""
    weight, rank = key.form_digest.split("/")
    return int(weight), int(rank)


class LedgerDecoder:
    """One base matrix of zeros; merged with an adapter every element is rank * weight^2, which tells whose it is."""

    def __init__(self, keys: Sequence[AdapterKey]) -> None:
        self.matrices = (BaseMatrix(0, LoraSites((0,), ((0, WIDTH),)), PackedWeight(torch.zeros(WIDTH, WIDTH), WIDTH)),)
        self._now = self.matrices[0].weight.data
        self._weights = {rank * weight**2: weight for weight, rank in map(weight_and_rank, keys)} | {0: 0}

    def point(self, index: int, weight: PackedWeight) -> None:
        self._now = weight.data

    def __call__(self, x: torch.Tensor, *, batch: ForwardBatch) -> torch.Tensor:
        raise AssertionError("the ledger's model computes by itself")

    def weight(self) -> int:
        """Whose delta is in the matrix that the model reads; 0 for nobody's."""
        values = self._now.unique().tolist()
        assert len(values) == 1, f"merged weights hold more than one adapter's: {values}"
        return self._weights[int(values[0])]


class LedgerModel:
    """Reads and writes the pool's bytes by block table and slot table, as kernels do."""

    def __init__(self, pool: PagePool, tables: SlotTables, decoder: LedgerDecoder) -> None:
        self._pool = pool
        self._tables = tables
        self._decoder = decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def hidden(self, batch: ForwardBatch) -> torch.Tensor:
        tokens = self._pool.data.view(torch.int64).view(-1, LAYOUT.page_bytes // 8)
        per_page = LAYOUT.tokens_per_page
        for token, slot in zip(batch.token_ids.tolist(), batch.kv_slots.tolist(), strict=True):
            tokens[slot // per_page, slot % per_page] = token
        logits = torch.zeros(batch.num_tokens, VOCAB)
        ends = (batch.query_starts[1:] - 1).tolist()
        for at in batch.logit_rows.tolist():
            request = ends.index(at)
            length = int(batch.context_lens[request])
            pages = batch.block_tables[request].tolist()
            context = [int(tokens[pages[position // per_page], position % per_page]) for position in range(length)]
            logits[at, next_token(context, self._weight(int(batch.slots[at])))] = 1.0
        return logits

    def _weight(self, slot: int) -> int:
        """The one value that every row of the slot's adapter holds."""
        if slot == NO_SLOT:
            return self._decoder.weight()
        assert self._decoder.weight() == 0, "a step with deltas reads merged weights"
        rank = int(self._tables.ranks[slot, 0, 0])
        assert rank > 0, f"slot {slot} is empty"
        starts = self._tables.rows[slot, 0, 0, :, :rank].flatten().tolist()
        flat = self._pool.data.view(torch.float32).flatten()
        values = torch.cat([flat[start * PAGE_ALIGNMENT // 4 :][:WIDTH] for start in starts])
        assert bool((values == values[0]).all()), f"slot {slot} reaches bytes of more than one adapter: {values.tolist()}"
        return int(values[0])
