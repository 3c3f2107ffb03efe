"""A TCP proxy before PostgreSQL or S3 that goes away at will, and that stops a message on its way.

What stands at a chosen statement or request is killed there, without a hook in the product and without a sleep.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

Connect = Callable[[], socket.socket]
CHUNK = 1 << 16


@dataclass(eq=False)
class Hold:
    """Stops the first message to the server that has the last of `needles`, once the ones before were seen on its connection.

    With `answered`, the server gets that message and its answer is what is held back.
    """

    needles: Sequence[bytes]
    answered: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Until somebody stands there."""
        assert self.reached.wait(60), f"nobody sent {self.needles[-1]!r}"


class Proxy:
    """Forwards connections of a loopback port to where `connect` leads."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._away = threading.Event()
        self._hold: Hold | None = None
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self) -> None:
        """Gone: every connection breaks, and new ones break as soon as they are made."""
        self._away.set()
        self._drop_all()

    def mend(self) -> None:
        self._away.clear()

    def hold_at(self, *needles: bytes, answered: bool = False) -> Hold:
        """One at a time; whoever is killed there must be `let_go` afterwards."""
        self._hold = Hold(needles, answered=answered)
        return self._hold

    def let_go(self) -> None:
        """What was held back is never delivered: its sender is dead."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.released.set()

    def close(self) -> None:
        self.let_go()
        self._listener.close()
        self._drop_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            if self._away.is_set():
                client.close()
                continue
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            for one in (client, server):
                if one.family == socket.AF_INET:
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Event()  # set: what the server says is held back
            threading.Thread(target=self._requests, args=(client, server, answers), daemon=True).start()
            threading.Thread(target=self._answers, args=(client, server, answers), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, answers: threading.Event) -> None:
        seen, hold = 0, None
        with suppress(OSError):
            while data := client.recv(CHUNK):
                if hold is not self._hold:
                    seen, hold = 0, self._hold
                while hold is not None and not hold.reached.is_set() and seen < len(hold.needles) and hold.needles[seen] in data:
                    seen += 1
                if hold is not None and seen == len(hold.needles) and not hold.reached.is_set():
                    self._stand(hold, server, data, answers)
                    hold.released.wait()
                    break
                server.sendall(data)
        self._end(client, server)

    def _stand(self, hold: Hold, server: socket.socket, data: bytes, answers: threading.Event) -> None:
        if hold.answered:
            answers.set()
            server.sendall(data)  # `_answers` says when the server has answered
        else:
            hold.reached.set()

    def _answers(self, client: socket.socket, server: socket.socket, answers: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK):
                hold = self._hold
                if answers.is_set() and hold is not None:
                    hold.reached.set()
                    hold.released.wait()
                    break
                client.sendall(data)
        self._end(client, server)

    def _end(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)
        for one in ends:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _drop_all(self) -> None:
        with self._lock:
            ends = list(self._open)
        for one in ends:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
