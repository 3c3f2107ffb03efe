"""Owns KV pages that requests share: full blocks of equal tokens under equal weights, of one tenant. Step thread only.

A block is known by a chained hash of everything that its K and V depend on: tenant, form digest (or base), all tokens from the
first on, and whether any of them was computed with merged weights, whose sums are rounded otherwise. So nothing crosses
tenants, forms or a re-push, and no request that is pinned to unmerged mode reads what merged mode wrote. A running request
uses its blocks by count; one that nobody uses is idle and leaves by the cost that adapters leave by.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

from gpu_runtime.adapters.eviction import HALF_LIFE_USES
from gpu_runtime.core import AdapterKey, Request
from gpu_runtime.memory.pages import PagePool

OWNER = "prefix"
COMPUTE_COST = 50.0  # of a byte of K and V, in copies of one from the host: 16 on an H100 (Llama-3.1-8B), 200 on two CPU cores
NUM_OFFERED = 8  # of the longest idle blocks, the one that costs least leaves
PRIOR_BLOCKS = 20  # before so many blocks were seen, a new one counts as little likely to be met again


@dataclass(eq=False)
class _Block:
    """One full page: `count` of uses as it was at use `at`; `forgotten`: nobody may find it, and it is erased when it is free."""

    digest: bytes
    page: int
    adapter: AdapterKey | None
    is_exact: bool
    count: float
    at: int
    num_users: int = 0
    was_met: bool = False
    forgotten: bool = False


@dataclass(frozen=True)
class IdleBlock:
    """See `eviction.Idle`."""

    last_used: int
    chance: float
    num_pages: int = 1
    wanted: bool = False
    byte_cost: float = COMPUTE_COST


@dataclass(eq=False)
class PrefixCounts:
    """Since the start: tokens that requests came with, and those of them that lay in the pool already."""

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_evicted_blocks: int = 0


class Prefixes:
    """Shares blocks of `tokens_per_page` tokens among requests, unless `enabled` is False."""

    def __init__(self, pool: PagePool, *, tokens_per_page: int, enabled: bool = True) -> None:
        self._pool = pool
        self._tokens = tokens_per_page
        self.enabled = enabled
        self._blocks: dict[bytes, _Block] = {}
        self._idle: OrderedDict[bytes, _Block] = OrderedDict()  # a block always after those that continue it
        self._chains: dict[str, list[_Block]] = {}
        self._num_uses = 0
        self._num_seen = 0
        self._num_met = 0
        self.counts = PrefixCounts()

    # ---- a request's life ----

    def attach(self, request: Request) -> None:
        """Give a request that has no pages the blocks that its tokens begin with; at least one token is left to compute."""
        assert not request.pages, f"{request.request_id} has pages already"
        chain = self._find(request) if self.enabled and not request.needs_scores else []
        for block in chain:
            self._idle.pop(block.digest, None)
            block.num_users += 1
        self._chains[request.request_id] = chain
        request.pages = [block.page for block in chain]
        request.num_computed = len(chain) * self._tokens
        request.is_exact = all(block.is_exact for block in chain)

    def admitted(self, request: Request) -> None:
        """The request runs with what `attach` gave it: that was a use."""
        self._num_uses += 1
        self.counts.num_queried_tokens += request.num_tokens
        self.counts.num_hit_tokens += request.num_computed
        if request.num_cached is None:
            request.num_cached = request.num_computed
        for block in self._chains[request.request_id]:
            self._num_met += not block.was_met
            block.count, block.at, block.was_met = self._chance(block) + 1.0, self._num_uses, True

    def extend(self, request: Request) -> None:
        """Share what has become a full block since; where an equal one is there already, the request goes on with that."""
        chain = self._chains[request.request_id]
        while self.enabled and (len(chain) + 1) * self._tokens <= request.num_computed:
            chain.append(self._share(request, len(chain)))
            chain[-1].num_users += 1

    def release(self, request: Request) -> None:
        """The request lets go of all its pages."""
        chain = self._chains.pop(request.request_id)
        self._pool.free(request.pages[len(chain) :])
        for block in reversed(chain):
            block.num_users -= 1
            if block.num_users == 0:
                self._rest(block)
        request.pages = []

    def num_shared(self, request: Request) -> int:
        """How many of the request's pages, from the first on, are shared ones."""
        return len(self._chains[request.request_id])

    # ---- pages ----

    def forget(self, adapter: AdapterKey) -> None:
        """A dropped adapter's K and V: nobody finds them any more; they are zeroed, now or when the last request lets go."""
        for block in [block for block in self._blocks.values() if block.adapter == adapter]:
            del self._blocks[block.digest]
            block.forgotten = True
            if self._idle.pop(block.digest, None) is not None:
                self._rest(block)

    def moved(self, pages: Mapping[int, int]) -> None:
        """Pages were copied, old -> new."""
        for block in self._all():
            block.page = pages.get(block.page, block.page)

    @property
    def num_idle_pages(self) -> int:
        return len(self._idle)

    @property
    def num_held_pages(self) -> int:
        return len(self._all())

    def offers(self) -> Iterator[tuple[IdleBlock, Callable[[], None]]]:
        """See `reclaim.Lender`."""
        for block in list(islice(self._idle.values(), NUM_OFFERED)):
            yield IdleBlock(block.at, self._chance(block)), partial(self._evict, block)

    def check_integrity(self) -> None:
        """Users are counted, idle blocks have none, every block has its page."""
        blocks = self._all()
        users = [block for chain in self._chains.values() for block in chain]
        for block in blocks:
            assert block.num_users == users.count(block), f"page {block.page} counts {block.num_users} users"
            assert self._pool.owner_of(block.page) == OWNER, f"page {block.page} is not a prefix's"
            idle = not block.num_users and not block.forgotten
            assert idle == (self._idle.get(block.digest) is block), f"page {block.page} has {block.num_users} users, idle is {not idle}"
        pages = {block.page for block in blocks}
        owned = self._pool.pages_by_owner().get(OWNER, 0)
        assert len(pages) == len(blocks) == owned, f"prefixes own {owned} pages of the pool, {len(blocks)} are known"

    # ---- inside ----

    def _find(self, request: Request) -> list[_Block]:
        chain: list[_Block] = []
        digest, exact = _root(request), True
        while (len(chain) + 1) * self._tokens < request.num_tokens:
            tokens = self._block_tokens(request, len(chain))
            kinds = [True, False] if exact and not request.params.deterministic else [exact]
            found = next((one for kind in kinds if (one := self._blocks.get(_chained(digest, tokens, exact=kind)))), None)
            if found is None:
                break
            chain.append(found)
            digest, exact = found.digest, found.is_exact
        return chain

    def _share(self, request: Request, at: int) -> _Block:
        """The block of the request's page `at`, which was its own until now."""
        chain = self._chains[request.request_id]
        parent = chain[-1].digest if chain else _root(request)
        digest = _chained(parent, self._block_tokens(request, at), exact=request.is_exact)
        found = self._blocks.get(digest)
        if found is not None:
            self._idle.pop(digest, None)
            self._pool.free([request.pages[at]])
            request.pages[at] = found.page
            return found
        self._num_seen += 1
        made = _Block(digest, request.pages[at], request.adapter, request.is_exact, count=self._prior(), at=self._num_uses)
        self._pool.hand_over(made.page, owner=OWNER)
        self._blocks[digest] = made
        return made

    def _block_tokens(self, request: Request, at: int) -> list[int]:
        return request.tokens(at * self._tokens, (at + 1) * self._tokens)

    def _rest(self, block: _Block) -> None:
        """Nobody uses the block any more."""
        if block.forgotten:
            self._pool.data[block.page] = 0
            self._pool.free([block.page])
        else:
            self._idle[block.digest] = block

    def _evict(self, block: _Block) -> None:
        del self._idle[block.digest], self._blocks[block.digest]
        self._pool.free([block.page])
        self.counts.num_evicted_blocks += 1

    def _prior(self) -> float:
        """How likely a block is met again at all, by those seen so far."""
        return self._num_met / (self._num_seen + PRIOR_BLOCKS)

    def _chance(self, block: _Block) -> float:
        return float(block.count * 0.5 ** ((self._num_uses - block.at) / HALF_LIFE_USES))

    def _all(self) -> list[_Block]:
        forgotten = {id(block): block for chain in self._chains.values() for block in chain if block.forgotten}
        return [*self._blocks.values(), *forgotten.values()]


def _root(request: Request) -> bytes:
    form = None if request.adapter is None else request.adapter.form_digest
    return hashlib.sha256(repr((request.tenant, form)).encode()).digest()


def _chained(parent: bytes, tokens: list[int], *, exact: bool) -> bytes:
    return hashlib.sha256(parent + repr((exact, tokens)).encode()).digest()
