"""A tenant's receiver: a real HTTP server on loopback that verifies signatures with the reference library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks.webhooks import Webhook, WebhookVerificationError


@dataclass
class Receiver:
    """`answers` are statuses in turn, the last one stays; `heard` are the deliveries whose signature is good."""

    url: str
    secret: str = ""
    answers: list[int] = field(default_factory=lambda: [204])
    answer_headers: dict[str, str] = field(default_factory=dict)
    heard: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    forged: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    num_inside: int = 0
    most_inside: int = 0

    def take(self, headers: dict[str, str], body: bytes) -> int:
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        self.gate.wait(5)
        self.num_inside -= 1
        try:
            Webhook(self.secret).verify(body, headers)
        except WebhookVerificationError:
            self.forged += 1
            return 401
        self.ids.append(headers["webhook-id"])
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if 200 <= status < 300:
            self.heard.append(json.loads(body))
        return status

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.heard]


@contextmanager
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = here.take({name.lower(): text for name, text in self.headers.items()}, body)
            self.send_response(status)
            for name, text in here.answer_headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Receiver(f"http://127.0.0.1:{server.server_port}/hook?token=private")
    here.gate.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
