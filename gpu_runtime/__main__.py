"""`python -m gpu_runtime`: one replica. Settings and port are checked, and threads set up, before anything heavy loads."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from gpu_runtime.config import RuntimeConfig, prepare_threads


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 after a drain, 1 with one line on stderr for what cannot work."""
    try:
        config = RuntimeConfig.from_environment(argv)
        prepare_threads(config)
        return _serve(config)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"gpu_runtime: {error}\n")
        return 1


def _serve(config: RuntimeConfig) -> int:
    with _listen(config) as listener:
        from gpu_runtime.server.logs import configure_logging  # noqa: PLC0415
        from gpu_runtime.server.process import run_replica  # noqa: PLC0415 - loads torch and numba, which read their threads now

        configure_logging()
        return run_replica(config, listener=listener)


def _listen(config: RuntimeConfig) -> socket.socket:
    """Bound before the model loads: a taken port shall not cost half a minute."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {config.host} port {config.port}: {error.strerror or error}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
