"""`python -m registry`: the HTTP server, until SIGTERM."""

from __future__ import annotations

import uvicorn

from registry.app import create_app
from registry.config import load_settings
from registry.logging import configure_logging


def main() -> None:
    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_s),
    )


if __name__ == "__main__":
    main()
