"""One process that serves the API: what it exports, and how it leaves."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from registry.app import create_app
from registry.config import Settings, tracing_wanted
from registry.metrics_listener import exported, listening
from registry.state_metrics import state_collectors
from registry.tracing import start_tracing

GARBAGE_AT = 20_000
"""Objects made and not yet gone, a few requests' worth, before the collector looks. Python's own is 700."""


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


def configure(app: FastAPI | None, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings; without `app` they say only where to listen."""
    return uvicorn.Config(
        app or "nothing",
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whom to believe is `trusted_proxies`, which the application asks itself
        timeout_graceful_shutdown=int(settings.drain_s),
    )


def serve(settings: Settings, *, sockets: Sequence[socket.socket] | None = None, number: int = 0) -> None:
    """Until SIGTERM or SIGINT, at the settings' address or at `sockets`. Worker `number` exports metrics so many ports further on.

    Raises ValueError as `create_app` does.
    """
    start_tracing("lorary-registry", wanted=tracing_wanted())
    app = create_app(settings)
    collectors = state_collectors(settings, app.state.database, app.state.readiness)
    _settle_garbage()
    metrics_port = settings.metrics_port + number if settings.metrics_port else 0
    with listening(settings.metrics_host, metrics_port, registry=exported(*collectors)):
        Server(configure(app, settings), app=app, delay_s=settings.drain_delay_s).run(None if sockets is None else list(sockets))


def _settle_garbage() -> None:
    """Let the collector of cycles look at requests only, and seldom: what was imported and built lives as long as the process.

    Otherwise it walks all of that again and again, and each time every request waits for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_AT, 10, 10)
