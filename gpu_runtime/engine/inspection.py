"""Who runs and who waits in an engine, and for how long: what `/debug/state` tells beside the pool map, read between two steps.

Names no token and no prompt. Everything is plain JSON.
"""

from __future__ import annotations

from typing import Any

from gpu_runtime.adapters.residency import Residency
from gpu_runtime.scheduling.queues import Queue, Ticket
from gpu_runtime.scheduling.scheduler import Scheduler

Json = dict[str, Any]
MAX_LISTED = 256  # requests of a queue: a full one has thousands


def activity(scheduler: Scheduler, residency: Residency, *, num_slots: int, now_s: float) -> Json:
    """On the step thread, beside `pool_map.snapshot`. Times are seconds until `now_s`, the engine's clock."""
    pool, host, disk = map(set, residency.tiers())
    return {
        "num_slots": num_slots,
        "adapters": {"pool": len(pool), "host": len(host - pool), "disk": len(disk - host - pool)},
        "running": _queue(scheduler.running, now_s=now_s),
        "waiting": _queue(scheduler.waiting, now_s=now_s),
    }


def _queue(queue: Queue, *, now_s: float) -> Json:
    tickets = list(queue)
    return {"total": len(tickets), "requests": [_request(ticket, now_s=now_s) for ticket in tickets[:MAX_LISTED]]}


def _request(ticket: Ticket, *, now_s: float) -> Json:
    request = ticket.request
    return {
        "request_id": request.request_id,
        "adapter": None if request.adapter is None else request.adapter._asdict(),
        "age_s": round(now_s - request.arrived_s, 3),
        "prompt_tokens": len(request.prompt_ids),
        "output_tokens": len(request.output_ids),
        "computed_tokens": request.num_computed,
        "pages": len(request.pages),
        "preemptions": request.num_preemptions,
        "deadline_in_s": None if request.deadline_s is None else round(request.deadline_s - now_s, 3),
    }
