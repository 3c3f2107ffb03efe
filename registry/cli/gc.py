"""`lorary gc`: remove what nobody needs any more, or say what that would be. Needs an admin key; workers do the work."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.client import Json, path
from registry.cli.failure import CliFailure
from registry.cli.jobs import DEFAULT_TIMEOUT_S, TimeoutOption, wait_for_job
from registry.cli.remote import Call, remote

noun = typer.Typer(help="Garbage collection of deleted versions and of bytes that nobody needs.", no_args_is_help=True)

WaitOption = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is over, and show what it did.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=500, help="How many to show.")]
COLUMNS = (
    "job_id",
    "state",
    "dry_run",
    "report.versions_purged",
    "report.swept_blobs",
    "report.swept_bytes",
    "report.orphan_blobs",
    "report.orphan_bytes",
    "report.unknown_blobs",
    "created_at",
    "finished_at",
)


@remote(noun, "plan")
def plan(call: Call, timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S) -> None:
    """Count what a collection would remove now, and remove nothing."""
    _collect(call, dry_run=True, wait=True, timeout_s=timeout_s)


@remote(noun, "run")
def run(call: Call, wait: WaitOption = True, timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S) -> None:
    """Collect garbage now. Bytes leave once they were left alone for LORARY_GC_GRACE_S; purged ones minutes after the purge."""
    _collect(call, dry_run=False, wait=wait, timeout_s=timeout_s)


@remote(noun, "status")
def status(call: Call, limit: LimitOption = 10) -> None:
    """Show the latest collections, newest first, with what they have done so far."""
    call.output.rows(call.client.get("/gc", limit=limit)["items"], *COLUMNS)


def _collect(call: Call, *, dry_run: bool, wait: bool, timeout_s: float) -> None:
    started = call.client.post("/gc", {"dry_run": dry_run})
    if not wait:
        call.output.item(_flat(started))
        return
    job = wait_for_job(call.client, started["job_id"], timeout_s=timeout_s, tell=lambda _line: None)
    call.output.item(_flat(call.client.get(path("gc", started["job_id"]))))
    if job["state"] != "succeeded":
        raise CliFailure(f"collection {job['id']} {job['state']}", error=(job.get("error") or {}).get("detail"))


def _flat(collection: Json) -> Json:
    """The report's counts beside the rest, for a line each."""
    rest = {name: value for name, value in collection.items() if name != "report"}
    return rest | {name: value for name, value in (collection["report"] or {}).items() if name != "dry_run"}
