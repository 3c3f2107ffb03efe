"""Is the process alive, and should it be sent requests? Two answers, asked by supervisors and load balancers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from gpu_runtime.engine.state import EngineState

DEAD = ("stopped", "failed")  # only a new process helps


@dataclass
class Health:
    """`registered` says whether the registry knows this replica. `draining` is set once and never taken back."""

    engine_state: Callable[[], EngineState]
    registered: Callable[[], bool]
    draining: bool = False

    def live(self) -> JSONResponse:
        """200 as long as the engine can still serve something."""
        condition = self.engine_state().condition
        return JSONResponse({"status": condition}, status_code=503 if condition in DEAD else 200)

    def ready(self) -> JSONResponse:
        """200 where a request sent now would be taken; the body says what is missing otherwise."""
        checks = self._checks()
        is_ready = all(checks.values())
        return JSONResponse({"status": "ready" if is_ready else "not ready", "checks": checks}, status_code=200 if is_ready else 503)

    def _checks(self) -> dict[str, Any]:
        condition = self.engine_state().condition
        return {"model_loaded": condition == "ready", "registered": self.registered(), "admitting": not self.draining}
