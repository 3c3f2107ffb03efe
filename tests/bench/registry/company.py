"""How quick the registry is while little is asked of it, and while many watch: two rows of `make bench-registry`.

- `authorise`: key -> tenant -> adapter -> version, over HTTP, at an even pace that nobody has to queue for (an open loop: a slow reply
  delays no other request, and counts from when its request was due). Its bar is DESIGN 3's 5 ms, an absolute time, so it means
  something on a machine that is otherwise idle.
- `list` beside 500 followers of jobs in which nothing happens, against `list` alone, in rounds that alternate.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from registry.db import Database
from registry.jobs import service as jobs
from registry.tenants.models import Tenant
from tests.bench.registry.generator import Sample, measure
from tests.bench.registry.lorary import Lorary
from tests.bench.registry.world import World, stop
from tests.postgresql import PostgreSQL

NUM_WATCHERS = 500
MAX_LIST_RATIO = 2.0
AUTHORISE_MS = 5.0
PER_S = 20
FOLLOWED_S = 30.0


@dataclass(frozen=True)
class Measured:
    """`ours` against `theirs` (what it is beside nobody, or the limit itself), in ms; at most `bar` times as much."""

    name: str
    ours: float
    theirs: float
    bar: float


def run(folder: Path, *, clients: int, workers: int, rounds: int, seconds: float, adapters: int = 2000) -> list[Measured]:
    """Against an installation of its own on a PostgreSQL of its own."""
    folder.mkdir(exist_ok=True)
    world = World(adapters=adapters, clients=clients, workers=workers)
    server = PostgreSQL(folder / "pg", durable=True)
    try:
        with server.installation() as name:
            side = Lorary(server, name, folder / "lorary", world)
            try:
                paced = pace(side.requests("resolve", client=0), port=side.port, per_s=PER_S, seconds=rounds * seconds)
                job_ids = _queue(server.url(name), NUM_WATCHERS)
                return [_authorise(paced), _listing(side, world, job_ids, rounds=rounds, seconds=seconds)]
            finally:
                stop(side.process)
    finally:
        server.stop()


def _authorise(sample: Sample) -> Measured:
    p99_ms = 1000 * sample.quantile(0.99)
    print(
        f"  authorise       {PER_S}/s  median {1000 * sample.median:>5.1f} ms  p99 {p99_ms:>5.1f} ms {dict(sample.others) or ''}",
        flush=True,
    )
    return Measured(f"authorise at {PER_S}/s, p99 against {AUTHORISE_MS:g} ms", p99_ms, AUTHORISE_MS, 1.0)


def _listing(side: Lorary, world: World, job_ids: Sequence[str], *, rounds: int, seconds: float) -> Measured:
    alone, beside = [], []
    for number in range(rounds):
        for watched in (False, True) if number % 2 == 0 else (True, False):
            (beside if watched else alone).append(_p99_ms(side, world, job_ids if watched else [], seconds=seconds))
    ours, theirs = statistics.median(beside), statistics.median(alone)
    print(f"  list            p99 {theirs:.1f} ms alone, {ours:.1f} ms beside {len(job_ids)} watchers", flush=True)
    return Measured(f"list beside {NUM_WATCHERS} idle watchers, p99", ours, theirs, MAX_LIST_RATIO)


def _p99_ms(side: Lorary, world: World, job_ids: Sequence[str], *, seconds: float) -> float:
    follow = side.follow_requests(job_ids)
    with following(follow, port=side.port):
        clients = [side.requests("list", client=number) for number in range(world.clients)]
        return 1000 * measure(clients, port=side.port, status=side.statuses["list"], seconds=seconds).quantile(0.99)


def _queue(url: str, count: int) -> list[str]:
    """Jobs that no worker takes."""
    database = Database(url)
    with database.system_write() as session:
        tenant_id = session.query(Tenant.id).filter_by(name="bench").scalar()
        made = [jobs.enqueue(session, kind="idle", tenant_id=tenant_id, subject_id="bench", payload={}).id for _ in range(count)]
    database.close()
    return made


@contextmanager
def following(requests: Sequence[bytes], *, port: int) -> Iterator[None]:
    """An open event stream for each request, which has sent its first event and is never read again."""
    with ExitStack() as held:
        for one in requests:
            connection = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=FOLLOWED_S))
            connection.sendall(one)
            head = b""
            while b"\nid: 1\n" not in head:
                received = connection.recv(65536)
                assert received, f"the stream ended: {head[:300]!r}"
                head += received
        yield


def pace(requests: Iterator[bytes], *, port: int, per_s: float, seconds: float) -> Sample:
    """An open loop over connections that stay: request n is due at n / per_s, and its latency counts from then."""
    return asyncio.run(_pace(list(islice(requests, int(per_s * seconds))), port=port, per_s=per_s, seconds=seconds))


async def _pace(requests: Sequence[bytes], *, port: int, per_s: float, seconds: float) -> Sample:
    sample, idle = Sample(seconds, []), []
    for _ in range(8):
        idle.append(await asyncio.open_connection("127.0.0.1", port))
    for one, (reader, writer) in zip(cycle(requests[:1]), list(idle), strict=False):  # a warm-up, not counted
        await _ask(one, reader, writer)
    began = time.perf_counter()

    async def ask(one: bytes, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        status = await _ask(one, reader, writer)
        idle.append((reader, writer))
        if status == 200:
            sample.latencies.append(time.perf_counter() - due)
        else:
            sample.others[str(status)] += 1

    await asyncio.gather(*(ask(one, began + number / per_s) for number, one in enumerate(requests)))
    for _reader, writer in idle:
        writer.close()
    return sample


async def _ask(one: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    writer.write(one)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return int(head[9:12])
