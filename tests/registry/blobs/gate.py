"""A TCP relay in front of a server, that can be closed, opened again, and told to break replies off."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import urlsplit


class Gate:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 80)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._limit: int | None = None
        self.broken = 0
        self._listener = self._listen(0)
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def open(self) -> None:
        self._listener = self._listen(self._port)

    def close(self) -> None:
        """Nobody listens any more, and every connection ends."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def break_replies_after(self, count: int) -> None:
        """Every connection is cut after `count` bytes to the client."""
        self._limit = count

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            with self._lock:
                self._open |= {client, server}
            threading.Thread(target=self._relay, args=(client, server), kwargs={"limited": False}, daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client), kwargs={"limited": True}, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, *, limited: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                sink.sendall(data)
                if limited and self._limit is not None and passed >= self._limit:
                    self.broken += 1
                    break
        for connection in (source, sink):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if limited:
            with self._lock:
                self._open -= {source, sink}
            source.close()
            sink.close()
