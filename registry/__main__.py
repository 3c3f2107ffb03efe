"""`python -m registry`: the HTTP server, until SIGTERM."""

from __future__ import annotations

import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from registry.app import create_app
from registry.config import load_settings
from registry.logging import configure_logging
from registry.metrics_listener import exported, listening
from registry.state_metrics import state_collectors


class Server(uvicorn.Server):
    """Shuts down in two steps: not ready first, and `delay_s` later, when nobody sends requests any more, no more requests.

    Streams that would last as long as the drain are let go then. A second signal skips the delay.
    """

    def __init__(self, config: uvicorn.Config, *, app: FastAPI, delay_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._delay_s = delay_s
        self._exit_at: float | None = None
        self._signal = signal.SIGTERM

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._exit_at is None:
            self._app.state.readiness.drain()
            self._exit_at, self._signal = time.monotonic() + self._delay_s, signal.Signals(sig)
        elif not self.should_exit:
            self._exit_at = time.monotonic()
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at is not None and time.monotonic() >= self._exit_at and not self.should_exit:
            self._app.state.job_watch.close()
            super().handle_exit(self._signal, None)
        return await super().on_tick(counter)


def main() -> None:
    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s),
    )
    collectors = state_collectors(settings, app.state.database, app.state.readiness)
    with listening(settings.metrics_host, settings.metrics_port, registry=exported(*collectors)):
        Server(config, app=app, delay_s=settings.drain_delay_s).run()


if __name__ == "__main__":
    main()
