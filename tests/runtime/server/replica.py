"""What the server's tests share: a replica over the real engine and a tiny model, listening on loopback, and its clients."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.adapters.source import AdapterSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.core import AdapterKey
from gpu_runtime.engine.build import build_engine
from gpu_runtime.engine.engine import Engine
from gpu_runtime.engine.loop import EngineLoop
from gpu_runtime.kernels.sample import sample
from gpu_runtime.server.app import Serving, create_app
from gpu_runtime.server.grants import GrantVerifier
from gpu_runtime.server.health import Health
from gpu_runtime.server.stream import StepLoop
from gpu_runtime.server.text import Text
from gpu_runtime.server.usage import UsageBuffer
from registry.serving.grants import GrantSigner
from registry.wire import GRANT_HEADER, GrantClaims

BASE_DIGEST = "b" * 64
VERSION_DIGEST = "a" * 64
TENANT = "t" * 32
REPLICA_ID = "replica-1"
SIGNER = GrantSigner("the registry's secret")
_numbers = itertools.count()


def grant(adapter: AdapterKey | None = None, **changes: Any) -> str:
    """A good grant for the base model or an adapter, unless the changes spoil it."""
    now = int(time.time())
    claims: dict[str, Any] = {"aud": REPLICA_ID, "jti": f"request-{next(_numbers)}", "iat": now, "exp": now + 30, "tenant": TENANT}
    claims |= {"model": "granted-name", "max_tokens": 4096, "key_id": "k"}
    if adapter is not None:
        claims |= {"tenant": adapter.tenant, "form_digest": adapter.form_digest, "version_digest": VERSION_DIGEST}
    return SIGNER.sign(GrantClaims.model_validate(claims | changes))


@dataclass
class Replica:
    """A listening server. `engine` is stepped by its own thread: look at it only where nothing runs."""

    url: str
    loop: Any
    text: Text
    health: Health
    usage: UsageBuffer
    clients: list[Any] = field(default_factory=list)

    def client(self, adapter: AdapterKey | None = None, **changes: Any) -> openai.OpenAI:
        """The real client; each of its attempts carries a fresh grant, as the front door gives it."""

        def sign(request: httpx2.Request) -> None:
            request.headers[GRANT_HEADER] = grant(adapter, **changes)

        http = httpx2.Client(event_hooks={"request": [sign]}, trust_env=False)
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", http_client=http, max_retries=0)
        self.clients.append(client)
        return client

    def post(self, path: str, body: Any = None, *, token: str | None = None, **options: Any) -> httpx2.Response:
        headers = {GRANT_HEADER: grant() if token is None else token} | options.pop("headers", {})
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with httpx2.Client(trust_env=False, timeout=30.0) as http:
            return http.post(self.url + path, content=content, headers=headers, **options)

    def get(self, path: str) -> httpx2.Response:
        with httpx2.Client(trust_env=False) as http:
            return http.get(self.url + path)

    def wait_idle(self, *, within_s: float = 5.0) -> None:
        """Nothing runs, nothing waits."""
        wait_until(lambda: (self.loop.state().num_running, self.loop.state().num_queued) == (0, 0), within_s=within_s)

    @contextmanager
    def streaming(self, path: str, body: Any, *, token: str | None = None) -> Iterator[httpx2.Response]:
        """A stream that is being read; leaving the block closes the connection."""
        headers = {GRANT_HEADER: grant() if token is None else token}
        with (
            httpx2.Client(trust_env=False, timeout=30.0) as http,
            http.stream("POST", self.url + path, json={"stream": True, **body}, headers=headers) as response,
        ):
            yield response


def wait_until(holds: Callable[[], bool], *, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.002)


def tiny_engine(model_dir: Path, source: AdapterSource, **settings: Any) -> Engine:
    sampler = settings.pop("sampler", sample)
    defaults: dict[str, Any] = {"poison_freed": True, "max_batch_requests": 8, "max_step_tokens": 64, "num_slots": 4, "threads": 1}
    config = RuntimeConfig(model_dir, **{**defaults, "pool_bytes": 16 * 2**20, **settings})
    return build_engine(config, source, base_digest=BASE_DIGEST, sampler=sampler)


@contextmanager
def engine_replica(model_dir: Path, source: AdapterSource | None = None, **settings: Any) -> Iterator[Replica]:
    """A replica over the real engine; at the end everything must have been given back."""
    engine = tiny_engine(model_dir, source or LocalSource(base_digest=BASE_DIGEST), **settings)
    loop = EngineLoop(engine)
    loop.start()
    limits = engine.scheduler.limits
    try:
        with replica_over(loop, Text(model_dir), context_tokens=limits.max_model_len, max_waiting=limits.max_waiting) as replica:
            yield replica
    finally:
        loop.stop()
    engine.check_integrity()
    assert not engine.has_work, "requests were left in the engine"


@contextmanager
def replica_over(loop: StepLoop, text: Text, *, context_tokens: int = 256, max_waiting: int = 64) -> Iterator[Replica]:
    """Serve `loop` on a free port of loopback, from a thread of its own."""
    health = Health(loop.state, lambda: True)
    verifier = GrantVerifier(REPLICA_ID, SIGNER.public_keys, leeway_s=5.0)
    usage = UsageBuffer()
    app = create_app(Serving(loop, text, verifier, health, usage, context_tokens=context_tokens, max_waiting=max_waiting))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=3))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    replica = Replica(f"http://127.0.0.1:{listener.getsockname()[1]}", loop, text, health, usage)
    try:
        yield replica
    finally:
        for client in replica.clients:
            client.close()
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
