"""Is the process alive, and should it be sent requests? Two answers, asked by supervisors and load balancers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import JSONResponse

from gpu_runtime.engine.state import EngineState

DEAD = ("stopped", "failed")  # only a new process helps


@dataclass
class Health:
    """`registered` says whether the registry knows this replica, `registry_error` why the last exchange with it failed.

    `draining` is set once and never taken back.
    """

    engine_state: Callable[[], EngineState]
    registered: Callable[[], bool]
    draining: bool = False
    registry_error: Callable[[], str | None] = lambda: None

    def live(self) -> JSONResponse:
        """200 as long as the engine can still serve something."""
        condition = self.engine_state().condition
        return JSONResponse({"status": condition}, status_code=503 if condition in DEAD else 200)

    def ready(self) -> JSONResponse:
        """200 where a request sent now would be taken; the body says what is missing otherwise."""
        checks = self.checks()
        is_ready = all(checks.values())
        body = {"status": "ready" if is_ready else "not ready", "checks": checks, "reasons": self._reasons(checks)}
        return JSONResponse(body, status_code=200 if is_ready else 503)

    def checks(self) -> dict[str, bool]:
        condition = self.engine_state().condition
        return {"model_loaded": condition == "ready", "registered": self.registered(), "admitting": not self.draining}

    def _reasons(self, checks: dict[str, bool]) -> list[str]:
        """What is missing, and a registry that is away though it knows us: nothing can be pulled then."""
        said = {
            "model_loaded": f"the engine is {self.engine_state().condition}",
            "registered": "the registry does not know this replica",
            "admitting": "this replica is shutting down",
        }
        error = self.registry_error()
        return [said[name] for name, holds in checks.items() if not holds] + ([f"the registry: {error}"] if error else [])
