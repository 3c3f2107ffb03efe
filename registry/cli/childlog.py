"""The output of supervised processes, line by line on stderr: prefixed with the process's name, or wrapped in JSON."""

from __future__ import annotations

import json
import secrets
import sys
import threading
from collections import defaultdict, deque
from typing import IO, Any

MAX_LINE_BYTES = 64 * 1024
TAIL_LINES = 5
NOT_SHOWN = frozenset({"event", "level", "timestamp", "logger", "color_message"})


class ChildLog:
    """One reader thread a process. Keeps each process's last lines, to say why it died.

    What the registry logs of requests under `poll_id`, the supervisor's own looks several times a second, is shown only where
    they fail.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.poll_id = f"up-{secrets.token_hex(8)}"  # not to be guessed: nobody else's requests are left out
        self._as_json = as_json
        self._tails: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=TAIL_LINES))
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def follow(self, name: str, stream: IO[bytes]) -> None:
        """Read `stream` to its end in a thread of its own, and close it."""
        thread = threading.Thread(target=self._pump, args=(name, stream), name=f"log-{name}", daemon=True)
        self._threads = [known for known in self._threads if known.is_alive()] + [thread]
        thread.start()

    def tell(self, event: str) -> None:
        """A line of the supervisor itself."""
        self._emit("up", event)

    def tail(self, name: str) -> list[str]:
        self.join(timeout_s=0.2)
        with self._lock:
            return list(self._tails[name])

    def join(self, *, timeout_s: float) -> None:
        """Wait for the readers of processes that have ended."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _pump(self, name: str, stream: IO[bytes]) -> None:
        with stream:
            while raw := stream.readline(MAX_LINE_BYTES):
                line = raw.decode(errors="replace").rstrip("\r\n")
                if not self._is_poll(line):
                    self._emit(name, line)

    def _is_poll(self, line: str) -> bool:
        event = _parse(line) if self.poll_id in line else None
        return event is not None and event.get("client_request_id") == self.poll_id and event.get("status", 0) < 500

    def _emit(self, name: str, line: str) -> None:
        with self._lock:
            self._tails[name].append(line)
            try:
                sys.stderr.write((wrapped(name, line) if self._as_json else plain(name, line)) + "\n")
                sys.stderr.flush()
            except (OSError, ValueError):
                pass  # nobody reads us any more; the child must still find its pipe drained


def wrapped(name: str, line: str) -> str:
    """The line as a JSON object with `process`: the child's own object where it wrote one."""
    return json.dumps({"process": name, **(_parse(line) or {"event": line})})


def plain(name: str, line: str) -> str:
    """`name | level event key=value ...` of a child's JSON line; any other line as it is."""
    event = _parse(line)
    if event is None:
        return f"{name} | {line}"
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in NOT_SHOWN and value is not None)
    return f"{name} | {event.get('level', 'info'):<7} {event.get('event', '')} {rest}".rstrip()


def _parse(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
