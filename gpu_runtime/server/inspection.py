"""`GET /debug/state`: what this replica is doing, for operators.

A replica knows no keys and no admins. It answers whoever brings an inspection that its registry signed for it, which the registry
does for admin keys alone (`GET /api/v1/replicas/{id}/state`): good once and for seconds, and no grant of a request.
"""

from __future__ import annotations

import asyncio
from typing import Any

from gpu_runtime.engine.loop import EngineStopped
from gpu_runtime.server.errors import unauthorised, unavailable
from gpu_runtime.server.grants import GrantRefused, GrantVerifier
from gpu_runtime.server.health import Health
from gpu_runtime.server.metrics import RuntimeMetrics
from gpu_runtime.server.stream import StepLoop

ANSWER_S = 5.0


def require_inspection(token: str, *, verifier: GrantVerifier) -> None:
    """Raises ApiError 401 for anything but an inspection addressed to this replica."""
    try:
        verifier.verify_inspection(token)
    except GrantRefused as error:
        raise unauthorised(str(error), code=f"grant_{error.reason}") from error


async def report(engine: StepLoop, *, health: Health, metrics: RuntimeMetrics) -> dict[str, Any]:
    """The engine as it stands between two steps, and what the server has counted. Raises ApiError 503 where no step ends in time."""
    try:
        found = await asyncio.wait_for(asyncio.wrap_future(engine.inspect()), ANSWER_S)
    except (TimeoutError, EngineStopped) as error:
        raise unavailable(f"the engine is {engine.state().condition} and did not answer within {ANSWER_S:g} s", code="busy") from error
    state = engine.state()
    counts = state.counts
    told = {
        "condition": state.condition,
        "ready": health.checks(),
        "counts": {
            "generated_tokens": counts.num_generated_tokens,
            "step_tokens": counts.num_step_tokens,
            "preemptions": counts.num_preemptions,
            "loads": counts.num_loads,
            "evictions": counts.num_evictions,
        },
        "first_token": metrics.first_tokens(),
    }
    return told | found
