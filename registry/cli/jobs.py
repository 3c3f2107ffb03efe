"""`lorary jobs`: asynchronous work, and waiting for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from registry.cli.client import ApiProblem, Json, RegistryClient, path
from registry.cli.failure import CliFailure
from registry.cli.remote import Call, remote

noun = typer.Typer(help="Jobs: work that outlives a request.", no_args_is_help=True)

FINAL = frozenset({"succeeded", "failed", "cancelled"})
FIRST_POLL_S, POLL_S = 0.05, 0.5
POLLS_A_WAIT = 20
"""A pause is a twentieth of the wait so far: nobody waits much longer than it takes, and long waits ask seldom."""
MAX_QUIET_S = 30.0
DEFAULT_TIMEOUT_S = 900.0

JobArgument = Annotated[str, typer.Argument(help="The job's id.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait.")]


@remote(noun, "list")
def list_jobs(call: Call) -> None:
    """List jobs, newest first."""
    call.output.rows(call.client.pages("/jobs"), "id", "kind", "state", "attempt", "created_at", "finished_at")


@remote(noun, "show")
def show(call: Call, job_id: JobArgument) -> None:
    """Show one job."""
    call.output.item(call.client.get(path("jobs", job_id)))


@remote(noun, "watch")
def watch(call: Call, job_id: JobArgument, timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S) -> None:
    """Follow a job until it ends. Exit code 1 unless it succeeded."""
    job = follow_job(call.client, job_id, timeout_s=timeout_s, tell=call.output.note)
    call.output.item(job)
    if job["state"] != "succeeded":
        raise CliFailure(f"job {job_id} {job['state']}", error=(job.get("error") or {}).get("detail"))


@remote(noun, "cancel")
def cancel(call: Call, job_id: JobArgument) -> None:
    """Ask a job to stop."""
    call.output.item(call.client.post(f"{path('jobs', job_id)}/cancel", {}))


def follow_job(client: RegistryClient, job_id: str, *, timeout_s: float, tell: Callable[[str], None]) -> Json:
    """The job once it has ended; everything that happens to it is told, as it happens. A lost stream is taken up again."""
    client.get(path("jobs", job_id))  # a wrong id, key or address is no reason to try again
    seen = 0

    def look() -> Json | None:
        nonlocal seen
        try:
            for event in _events(client, job_id, after=seen, until=deadline):
                seen = event["number"]
                tell(_event_line(job_id, event))
        except ApiProblem as problem:
            if problem.status < 500:
                raise
        except CliFailure:
            pass  # the registry restarts; the job goes on
        job = client.get(path("jobs", job_id))
        return job if job["state"] in FINAL else None

    deadline = time.monotonic() + timeout_s
    return poll(look, timeout_s=timeout_s, what=f"job {job_id}")


def _events(client: RegistryClient, job_id: str, *, after: int, until: float) -> Iterator[Json]:
    """Events above `after`, until the stream ends or the time is up. Keep-alive lines come every ten seconds."""
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    quiet_s = min(MAX_QUIET_S, max(0.1, until - time.monotonic()))
    with client.lines(f"{path('jobs', job_id)}/events", headers=headers, quiet_s=quiet_s) as lines:
        for line in lines:
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))
            if time.monotonic() >= until:
                return


def _event_line(job_id: str, event: Json) -> str:
    return f"job {job_id}: {event['state']}" + (f" {event['data']}" if event.get("data") else "")


def wait_for_job(client: RegistryClient, job_id: str, *, timeout_s: float, tell: Callable[[str], None]) -> Json:
    """The job once it has ended, however it ended; every change of state or progress is told."""
    seen: Any = None

    def look() -> Json | None:
        nonlocal seen
        job = client.get(path("jobs", job_id))
        if (job["state"], job.get("progress")) != seen:
            seen = (job["state"], job.get("progress"))
            tell(_line(job))
        return job if job["state"] in FINAL else None

    return poll(look, timeout_s=timeout_s, what=f"job {job_id}")


def poll(look: Callable[[], Json | None], *, timeout_s: float, what: str) -> Json:
    """Ask `look` until it answers something, often at first. Raises CliFailure after `timeout_s`; the work itself goes on."""
    begun, pause_s = time.monotonic(), FIRST_POLL_S
    deadline = begun + timeout_s
    while True:
        found = look()
        if found is not None:
            return found
        if time.monotonic() >= deadline:
            raise CliFailure(f"{what} has not ended after {timeout_s:g} s; it goes on", remedy="is a worker running? See `lorary doctor`")
        time.sleep(pause_s)
        pause_s = min(POLL_S, max(FIRST_POLL_S, (time.monotonic() - begun) / POLLS_A_WAIT))


def _line(job: Json) -> str:
    progress = job.get("progress")
    return f"job {job['id']} ({job['kind']}): {job['state']}" + (f" {progress}" if progress else "")
