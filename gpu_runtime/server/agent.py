"""The replica's link to its registry: registers, reports what it holds and what was used, learns grant keys and what to drop.

One thread, one edge: whatever goes wrong with the registry, the replica goes on serving the requests it has and this
loop tries again. The registry hears of an engine that fails or drains as "draining", and chooses others.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import httpx2

from gpu_runtime.core import AdapterKey
from gpu_runtime.engine.state import EngineState
from gpu_runtime.server.grants import GrantVerifier
from gpu_runtime.server.usage import UsageBuffer
from registry.wire import (
    MAX_RESIDENTS,
    REPLICAS_PATH,
    USAGE_PATH,
    Heartbeat,
    HeartbeatReply,
    ReplicaRegistration,
    ReplicaWelcome,
    Resident,
    UsageReply,
    UsageReport,
    WireModel,
    require_wire_version,
)

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 10.0  # below the registry's replica_ttl_s, so that a registry that comes back sees us in time
TIMEOUT = httpx2.Timeout(10.0, connect=3.0)
UNREADABLE = (400, 413, 422)  # the registry will say so every time
NEAREST_FIRST = {"pool": 0, "host": 1, "disk": 2}

Answer = TypeVar("Answer", bound=WireModel)


class ReplicaEngine(Protocol):
    """What the agent needs of `EngineLoop`."""

    def state(self) -> EngineState: ...

    def drop(self, key: AdapterKey) -> Future[None]: ...


class RegistryRefused(Exception):
    """The registry answered, and not with what we asked for. `status` is HTTP's."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status


class ReplicaAgent:
    """Keeps one replica known to its registry. `start` and `stop` once each; `drain` any time between.

    `url` is where the registry reaches this replica, `key` an API key of scope `replica`, `base_digest` identifies the
    base model that the engine serves. The verifier is given its identity and keys as they become known.
    """

    def __init__(
        self,
        engine: ReplicaEngine,
        *,
        registry_url: str,
        key: str,
        url: str,
        base_digest: str,
        verifier: GrantVerifier,
        usage: UsageBuffer,
        backoff_s: float = 0.5,
    ) -> None:
        self._engine = engine
        self._url = url
        self._base_digest = base_digest
        self._verifier = verifier
        self._usage = usage
        self._first_backoff_s = self._backoff_s = backoff_s
        self._client = httpx2.Client(base_url=registry_url, headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT, trust_env=False)
        self._replica_id: str | None = None
        self._last_error: str | None = None
        # Starts at the clock, so that a late heartbeat of the process before us is older than our first one.
        self._sequence = time.time_ns() // 1_000_000
        self._drops: dict[AdapterKey, Future[None]] = {}
        self._draining = False
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replica-agent", daemon=True)

    # ---- any thread ----

    @property
    def replica_id(self) -> str | None:
        """None while the registry does not know us."""
        return self._replica_id

    @property
    def last_error(self) -> str | None:
        """Why the latest exchange with the registry failed, or None if it did not."""
        return self._last_error

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Tell the registry at once to send nothing more; heartbeats go on until `stop`."""
        self._draining = True
        self._hurry.set()

    def stop(self) -> None:
        """Say goodbye and end the thread. Idempotent, and quick even if the registry is away."""
        self.drain()
        self._stopping.set()
        self._hurry.set()
        if self._thread.is_alive():
            self._thread.join(timeout=TIMEOUT.read)
        self._client.close()

    # ---- the agent's thread ----

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause_s = self._exchange()
            self._hurry.wait(pause_s)
            self._hurry.clear()
        if self._replica_id is not None:
            self._exchange()

    def _exchange(self) -> float:
        """One round with the registry; returns the pause before the next one, in seconds."""
        try:
            if self._replica_id is None:
                self._register()
            pause_s = self._report()
            self._report_usage()
        except Exception as error:  # noqa: BLE001 - the agent's edge: a registry that is away or wrong must not end the replica
            return self._failed(error)
        self._last_error = None
        self._backoff_s = self._first_backoff_s
        return pause_s

    def _register(self) -> None:
        state = self._engine.state()
        registration = ReplicaRegistration(
            url=self._url, base_digest=self._base_digest, max_rank=state.max_rank, num_pages=state.num_pages, page_bytes=state.page_bytes
        )
        welcome = self._post(REPLICAS_PATH, registration, answer=ReplicaWelcome)
        self._verifier.update(replica_id=welcome.replica_id, public_keys=welcome.grant_public_keys, leeway_s=welcome.grant_leeway_s)
        self._replica_id = welcome.replica_id
        log.info("replica.registered", extra={"replica_id": welcome.replica_id, "base_model": welcome.base_model})

    def _report(self) -> float:
        self._sequence += 1
        heartbeat = self._heartbeat(self._engine.state())
        reply = self._post(f"{REPLICAS_PATH}/{self._replica_id}/heartbeat", heartbeat, answer=HeartbeatReply)
        self._verifier.update(public_keys=reply.grant_public_keys)
        self._drop(reply.drop)
        return reply.heartbeat_interval_s

    def _report_usage(self) -> None:
        """All that waits, in batches. A batch stays until it is acknowledged; one that cannot be read never will be."""
        while batch := self._usage.batch():
            try:
                reply = self._post(USAGE_PATH.format(replica_id=self._replica_id), UsageReport(requests=batch), answer=UsageReply)
            except RegistryRefused as error:
                if error.status not in UNREADABLE:
                    raise
                log.error("usage.unreadable", extra={"num_requests": len(batch), "reason": str(error)})
            else:
                if reply.num_refused:
                    log.warning("usage.refused", extra={"num_requests": reply.num_refused})
            self._usage.settled()

    def _heartbeat(self, state: EngineState) -> Heartbeat:
        nearest = sorted(state.residents, key=lambda resident: NEAREST_FIRST[resident.tier])[:MAX_RESIDENTS]
        return Heartbeat(
            sequence=self._sequence,
            state="ready" if state.condition == "ready" and not self._draining else "draining",
            num_queued=state.num_queued,
            num_running=state.num_running,
            num_free_pages=state.num_free_pages,
            residents=tuple(Resident(tenant=one.key.tenant, form_digest=one.key.form_digest, tier=one.tier) for one in nearest),
        )

    def _drop(self, unwanted: tuple[Resident, ...]) -> None:
        """The registry repeats itself until we stop reporting a resident; each is dropped once at a time."""
        self._drops = {key: done for key, done in self._drops.items() if not done.done()}
        for resident in unwanted:
            key = AdapterKey(resident.tenant, resident.form_digest)
            if key not in self._drops:
                self._drops[key] = self._engine.drop(key)
                log.info("adapter.dropped", extra={"tenant": key.tenant, "form_digest": key.form_digest})

    def _post(self, path: str, message: WireModel, *, answer: type[Answer]) -> Answer:
        response = self._client.post(path, json=message.model_dump(mode="json"))
        if not response.is_success:
            raise RegistryRefused(response.status_code, _detail(response))
        body = response.json()
        require_wire_version(body)
        return answer.model_validate(body)

    def _failed(self, error: Exception) -> float:
        self._last_error = f"{type(error).__name__}: {error}"
        pause_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, MAX_BACKOFF_S)
        if isinstance(error, RegistryRefused) and error.status == 404 and self._replica_id is not None:
            self._replica_id = None  # the registry forgot us (restored, or swept while we were cut off): register again
            pause_s = 0.0
        known = isinstance(error, RegistryRefused | httpx2.TransportError | ValueError)
        log.warning("registry.unreachable", extra={"reason": self._last_error, "pause_s": pause_s}, exc_info=not known)
        return pause_s


def _detail(response: httpx2.Response) -> str:
    try:
        body: Any = response.json()
    except ValueError:
        return response.text[:200]
    return str(body.get("detail", body))[:500] if isinstance(body, dict) else str(body)[:200]
