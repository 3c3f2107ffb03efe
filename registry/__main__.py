"""`python -m registry`: the HTTP server, until SIGTERM."""

from __future__ import annotations

from types import FrameType

import uvicorn
from fastapi import FastAPI

from registry.app import create_app
from registry.config import load_settings
from registry.logging import configure_logging


class Server(uvicorn.Server):
    """Lets go of the streams that would otherwise last as long as the drain."""

    def __init__(self, config: uvicorn.Config, *, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.job_watch.close()
        super().handle_exit(sig, frame)


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
    Server(config, app=app).run()


if __name__ == "__main__":
    main()
