"""Page arithmetic: what a request needs, whether it could ever run, whether it can run now. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_runtime.core import Request
from gpu_runtime.memory.layout import PageLayout


@dataclass(frozen=True)
class Limits:
    """Of one engine. `max_step_tokens` is the token budget of a step, `max_model_len` bounds prompt and output together."""

    num_pages: int
    max_batch_requests: int
    max_step_tokens: int
    max_model_len: int
    max_waiting: int

    def require_possible(self, request: Request, *, layout: PageLayout, num_adapter_pages: int) -> None:
        """Raises ValueError if not even an empty pool could serve the request."""
        wanted = len(request.prompt_ids) + request.params.max_tokens
        if not request.prompt_ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        if wanted > self.max_model_len:
            raise ValueError(
                f"prompt and max_tokens are {len(request.prompt_ids)} + {request.params.max_tokens} tokens; "
                f"together they must be at most {self.max_model_len}"
            )
        num_pages = layout.pages_for(wanted) + num_adapter_pages
        if num_pages > self.num_pages:
            raise ValueError(
                f"prompt, max_tokens and adapter take {num_pages} pages of memory, of which {num_adapter_pages} for the adapter; "
                f"this runtime has {self.num_pages}: shorten the prompt or lower max_tokens"
            )


def admission_pages(request: Request, *, layout: PageLayout) -> int:
    """KV pages to take at admission: all known tokens and the next one, so that no prefill ever stops for want of a page."""
    return layout.pages_for(request.num_tokens + 1)


def headroom_pages(num_running: int) -> int:
    """Pages to leave free when admitting beside others: each of them may need one soon, and a preemption costs a whole prefill."""
    return num_running
