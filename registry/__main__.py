"""`python -m registry`: the HTTP server, until SIGTERM."""

from __future__ import annotations

import sys

from registry.config import load_settings
from registry.logging import configure_logging
from registry.prefork import Workers
from registry.server import serve


def main() -> None:
    settings = load_settings()
    configure_logging(format=settings.log_format, level=settings.log_level)
    if settings.api_workers > 1:
        sys.exit(Workers(settings).run())
    serve(settings)


if __name__ == "__main__":
    main()
