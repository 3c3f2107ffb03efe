"""The nouns of the runtime: what every layer shares. Imports nothing above it, and no torch.

SamplingParams   how to choose tokens                     AdapterKey   runtime identity of an adapter
Request          one sequence, from queue to last token   Segment      run of batch tokens sharing one slot
StepOutput       what one step emitted for one request
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

# The linears that an adapter may modify; this order is the index of a target in every table.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

F32, F16, BF16 = 0, 1, 2  # how an adapter's rows are stored: codes of slot tables and kernels

NO_SLOT = -1  # base rows: every kernel leaves them alone before it touches anything else


class AdapterKey(NamedTuple):
    """(tenant, form digest): the only identity that slots, caches and prefix keys use (DESIGN 2)."""

    tenant: str
    form_digest: str


@dataclass(frozen=True)
class SamplingParams:
    """Greedy where temperature is 0. `top_k` 0, `top_p` 1 and `min_p` 0 are off; `logprobs` None is off, n reports n top ones.

    Penalties and `logit_bias` change the logits before anything else. `frequency_penalty` and `presence_penalty` count the
    output alone (OpenAI); `repetition_penalty` divides what prompt or output holds (CTRL, arXiv 1909.05858, section 4.1).

    `deterministic` pins a request to unmerged mode, whose results no neighbour and no change of mode can touch by a bit.

    Raises ValueError naming the field, the value and what is allowed.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # what stopped the text is part of it
    min_tokens: int = 0  # before these, no token and no string ends the text
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # as logprobs, of each token of the prompt but the first
    ignore_eos: bool = False
    min_p: float = 0.0  # of the likeliest token's probability, after temperature
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    deterministic: bool = False

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "between 0 and 2")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 20, name, value, "between 0 and 20")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, f"0 to max_tokens, {self.max_tokens}")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 and 1")
        for name in ("frequency_penalty", "presence_penalty"):
            _require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "between -2 and 2")
        _require(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", self.repetition_penalty, "above 0 and at most 10")
        _require(all(abs(bias) <= 100.0 for _, bias in self.logit_bias), "logit_bias", self.logit_bias, "between -100 and 100 each")
        _require(len(self.stop) <= 4 and all(self.stop), "stop", self.stop, "at most four strings, none of them empty")

    @property
    def changes_logits(self) -> bool:
        """Whether the next token is chosen from other logits than the model's."""
        return bool(self.logit_bias or self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


class Segment(NamedTuple):
    """Tokens [start, end) of the batch, all using `slot` (NO_SLOT = base model alone)."""

    start: int
    end: int
    slot: int


class RequestState(Enum):
    WAITING = "waiting"  # queued; its adapter may still be on its way
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(eq=False)
class Request:
    """One sequence. Owned by the step loop's thread once queued; others only read `request_id` and set nothing."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterKey | None
    arrived_s: float
    deadline_s: float | None = None
    tenant: str = ""  # whose it is; with an adapter, the adapter's tenant
    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of prompt tokens 1, 2, ... as far as they are computed
    num_computed: int = 0  # tokens whose K and V are in the pool
    pages: list[int] = field(default_factory=list)  # KV pages, in token order
    slot: int = NO_SLOT
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    num_cached: int | None = None  # tokens whose K and V lay in the pool when it first ran
    is_exact: bool = True  # no K and V of it was computed with merged weights

    def __post_init__(self) -> None:
        if self.adapter is not None:
            self.tenant = self.adapter.tenant

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def needs_scores(self) -> bool:
        """Whether logprobs of its prompt are still to come: then no K and V that are there already may stand in for its tokens."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt_ids) - 1

    @property
    def is_decoding(self) -> bool:
        return self.num_uncomputed == 1 and self.num_computed >= len(self.prompt_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids [start, end) over prompt and output together."""
        prompt = len(self.prompt_ids)
        return [*self.prompt_ids[start:end], *self.output_ids[max(0, start - prompt) : max(0, end - prompt)]]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities under the unmodified distribution (before temperature, top_k and top_p).

    `rank`: 1 for the likeliest token, known for tokens of a prompt alone.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class StepOutput:
    """What one step emitted for one request; the last one carries `finish_reason`, and `error` if it failed.

    The first one carries `prompt_logprobs` where they were asked for: of every token of the prompt but the first.
    `retryable`: the same request may succeed after `retry_after_s` (503); otherwise it will not (its adapter is gone or does not fit).
    """

    request_id: str
    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    retryable: bool = False
    num_cached: int = 0  # tokens of the prompt that did not have to be computed
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    retry_after_s: int = 1
