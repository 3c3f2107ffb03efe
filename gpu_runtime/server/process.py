"""The life of one replica process: build, listen, register, serve, drain, leave.

SIGTERM and SIGINT begin a drain: the registry is told, new requests get 503, running ones have `drain_s` to finish, then
the process exits 0. A second signal ends it at once. An engine that has failed for good ends it with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import uvicorn

from gpu_runtime.config import RuntimeConfig, tracing_wanted
from gpu_runtime.engine.build import build_engine
from gpu_runtime.engine.loop import EngineLoop
from gpu_runtime.server.agent import ReplicaAgent
from gpu_runtime.server.app import Serving, create_app
from gpu_runtime.server.grants import GrantVerifier
from gpu_runtime.server.health import Health
from gpu_runtime.server.pull import RegistrySource
from gpu_runtime.server.text import Text
from gpu_runtime.server.tracing import flush_tracing, start_tracing
from gpu_runtime.server.usage import UsageBuffer
from registry.artifact.base import compute_base_digest

log = structlog.get_logger(__name__)

LAST_WRITES_S = 5  # after the drain: for responses that are still on their way out
KEEP_ALIVE_S = 75  # longer than any client of ours keeps an idle connection, so that the client is who closes it
WATCH_S = 0.5


@dataclass(frozen=True)
class Replica:
    """Everything that runs, wired."""

    engine: EngineLoop
    agent: ReplicaAgent
    source: RegistrySource
    health: Health
    server: uvicorn.Server
    drain_s: int


class _Listener(uvicorn.Server):
    """Leaves signals alone: a drain comes before the server's own shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_replica(config: RuntimeConfig, *, listener: socket.socket) -> int:
    """Serve until told to stop; the exit status. Raises ValueError for settings and model folders that cannot work."""
    start_tracing("lorary-runtime", wanted=tracing_wanted())
    return asyncio.run(_live(_build(replace(config, port=listener.getsockname()[1])), listener))


def _build(config: RuntimeConfig) -> Replica:
    registry_url, key = _registry_of(config)
    _require_model(config.model_dir)
    log.info("replica.starting", model_dir=str(config.model_dir), url=config.url)
    text = Text(config.model_dir)
    source = RegistrySource(registry_url, key=key)
    base_digest = compute_base_digest(config.model_dir)
    engine = build_engine(config, source, base_digest=base_digest)
    loop = EngineLoop(engine)
    verifier, usage = GrantVerifier(), UsageBuffer()
    agent = ReplicaAgent(loop, registry_url=registry_url, key=key, url=config.url, base_digest=base_digest, verifier=verifier, usage=usage)
    health = Health(loop.state, lambda: agent.replica_id is not None, registry_error=lambda: agent.last_error)
    serving = Serving(
        loop,
        text,
        verifier,
        health,
        usage,
        context_tokens=engine.scheduler.limits.max_model_len,
        max_waiting=config.max_waiting,
        deadline_ms=config.deadline_ms,
    )
    options = uvicorn.Config(
        create_app(serving),
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WRITES_S,
        server_header=False,
    )
    log.info("replica.built", base_digest=base_digest, context_tokens=serving.context_tokens)
    return Replica(loop, agent, source, health, _Listener(options), config.drain_s)


def _registry_of(config: RuntimeConfig) -> tuple[str, str]:
    if not config.registry_url:
        raise ValueError("registry_url is not set: pass --registry-url or LORARY_RUNTIME_REGISTRY_URL")
    if not config.registry_url.startswith(("http://", "https://")):
        raise ValueError(f"registry_url is {config.registry_url!r}; it must begin with http:// or https://")
    if config.replica_key_file is None:
        raise ValueError("replica_key_file is not set: pass --replica-key-file, a file that holds an API key of scope replica")
    try:
        key = config.replica_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"replica_key_file {config.replica_key_file} cannot be read: {error}") from error
    if not key.startswith("lry_"):
        raise ValueError(f"replica_key_file {config.replica_key_file} holds no API key: keys begin with lry_")
    return config.registry_url, key


def _require_model(model_dir: Path) -> None:
    missing = [name for name in ("config.json", "tokenizer.json") if not (model_dir / name).is_file()]
    if missing or not any(model_dir.glob("*.safetensors")):
        raise ValueError(f"model_dir {model_dir} is no base model folder: it lacks {', '.join(missing) or '*.safetensors'}")


async def _live(replica: Replica, listener: socket.socket) -> int:
    draining = asyncio.Event()
    _on_signals(draining)
    replica.engine.start()
    serving = asyncio.create_task(replica.server.serve(sockets=[listener]))
    guards = [asyncio.create_task(_register_once_up(replica)), asyncio.create_task(_drain_when(draining, replica))]
    guards.append(asyncio.create_task(_end_when_failed(replica)))
    await serving
    for guard in guards:
        guard.cancel()
    failed = replica.engine.state().condition == "failed"
    await asyncio.to_thread(_leave, replica)
    return 1 if failed else 0


def _on_signals(draining: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def begin() -> None:
        draining.set()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)  # back to the default: the second one ends the process

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, begin)


async def _register_once_up(replica: Replica) -> None:
    """The registry may send a request as soon as it knows us, so it hears of us only when we listen."""
    while not replica.server.started:
        await asyncio.sleep(0.01)
    replica.agent.start()
    log.info("replica.listening")


async def _drain_when(draining: asyncio.Event, replica: Replica) -> None:
    await draining.wait()
    log.info("replica.draining", limit_s=replica.drain_s)
    replica.health.draining = True
    replica.agent.drain()
    await asyncio.to_thread(replica.engine.stop, drain_s=replica.drain_s)
    replica.server.should_exit = True


async def _end_when_failed(replica: Replica) -> None:
    while replica.engine.state().condition != "failed":
        await asyncio.sleep(WATCH_S)
    log.error("replica.engine_failed")
    replica.server.should_exit = True


def _leave(replica: Replica) -> None:
    replica.agent.stop()
    replica.engine.stop()
    replica.source.close()
    flush_tracing()
    log.info("replica.stopped")
